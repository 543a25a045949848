"""What matters most: the importance of trained numbers, |p dL/dp|, smoothed over steps, for methods that train on a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.adapter import Adapter
from trimtab.errors import TrainingError


def track(adapter: Adapter) -> tuple[str, ...]:
    """Give each parameter buffers for the mean of its importance and for its spread; returns their names."""
    found: list[str] = []
    for name, p in list(adapter.named_parameters()):
        for kind in ("mean", "spread"):
            found.append(f"{kind}_{name.replace('.', '_')}")
            adapter.register_buffer(found[-1], torch.zeros_like(p, requires_grad=False), persistent=False)
    return tuple(found)


def observe(adapter: Adapter, tensors: dict[str, Tensor], beta1: float, beta2: float, *, first: str) -> None:
    """One step more. `first`: whether the spread is taken about the mean as it was or as it is now."""
    for name, p in tensors.items():
        if p.grad is None:
            raise TrainingError(f"{name} has no gradient: a budget is told of a step after backward(), before zero_grad()")
        now, (mean, spread) = (p * p.grad).abs(), _pair(adapter, name)
        if first == "mean":
            mean.mul_(beta1).add_((1 - beta1) * now)
        spread.mul_(beta2).add_((1 - beta2) * (now - mean).abs())
        if first == "spread":
            mean.mul_(beta1).add_((1 - beta1) * now)


def score(adapter: Adapter, name: str) -> Tensor:
    mean, spread = _pair(adapter, name)
    return mean * spread


def forget(adapter: Adapter) -> None:
    for name, _ in adapter.named_parameters():
        for tensor in _pair(adapter, name):
            tensor.zero_()


def best(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest."""
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, scores.topk(min(count, len(scores))).indices, True)


def _pair(adapter: Adapter, name: str) -> tuple[Tensor, Tensor]:
    key = name.replace(".", "_")
    return adapter.get_buffer(f"mean_{key}"), adapter.get_buffer(f"spread_{key}")

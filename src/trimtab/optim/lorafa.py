"""LoRA-FA: A stays as it starts, and B's gradient is the one that moves the product as full fine-tuning would."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.errors import ConfigError
from trimtab.optim._pairs import inverse, parts


class LoraFAOptimizer(Optimizer):
    """g <- g (A A^T + 1e-8)^-1 / s^2 for each B of a pair, then Adam with decoupled decay    arXiv:2308.03303

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    `pairs`: (B, A, s) of each product. Other parameters take the step alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        pairs: Iterable[tuple[Tensor, Tensor, float]] = (),
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr={lr}, betas={betas}, eps={eps}: lr and eps are at least 0, betas between 0 and 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias))
        self.pairs = {id(B): (A, s) for B, A, s in pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, self._projected(p), group)
        return loss

    def _projected(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        if id(p) not in self.pairs:
            return p.grad
        A, s = self.pairs[id(p)]
        back = inverse(A @ A.T, 1e-8)
        return (p.grad.to(back) @ back / s**2).to(p.grad)

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2), lr = self.state[p], group["betas"], group["lr"]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        size = lr * (1 - b2**t) ** 0.5 / (1 - b1**t) if group["correct_bias"] else lr
        p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            p.add_(p, alpha=-lr * group["weight_decay"])


def create_lorafa_optimizer(
    model: Any, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """Freeze each `lora_A` and train the rest. `r`, `lora_alpha` and `use_rslora` must be those of the active adapters, whose
    layers say their scale themselves."""
    said = {"r": r, "lora_alpha": lora_alpha} | ({} if use_rslora is None else {"use_rslora": use_rslora})
    for name in model.active_adapters:
        there = {field: getattr(model.peft_config[name], field, None) for field in said}
        if there != said:
            raise ConfigError(f"create_lorafa_optimizer: adapter {name!r} has {there}, and {said} was said")
    return frozen_a(model, lr=lr, weight_decay=weight_decay)


def frozen_a(model: nn.Module, *, lr: float, **options: Any) -> LoraFAOptimizer:
    products = parts(model)
    for part in products:
        part.lora_A.weight.requires_grad_(False)
        part.remembers = (*part.remembers, "lora_A.weight")  # a checkpoint of a run holds it all the same
    pairs = [(part.lora_B.weight, part.lora_A.weight, part.s) for part in products]
    return LoraFAOptimizer([p for p in model.parameters() if p.requires_grad], lr=lr, pairs=pairs, **options)

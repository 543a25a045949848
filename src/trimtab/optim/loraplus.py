"""LoRA+: B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.core.base import port
from trimtab.core.sites import frozen
from trimtab.errors import ConfigError
from trimtab.optim._pairs import embeddings


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """`optimizer_cls` with the learning rate `lr * loraplus_lr_ratio` for B and all vectors, `lr` for A and what else is
    trained, and `loraplus_lr_embedding` (1e-6) for adapters on embeddings                          arXiv:2402.12354

    `loraplus_weight_decay` (0) acts on all but biases and norms. Other `kwargs` are the optimizer's.
    """
    if not loraplus_lr_ratio > 0:
        raise ConfigError(f"loraplus_lr_ratio={loraplus_lr_ratio!r}: it must be above 0; 16 is usual")
    decay = {"weight_decay": kwargs.pop("loraplus_weight_decay", 0.0)}
    slow = kwargs.pop("loraplus_lr_embedding", 1e-6)
    looked_up, free = {id(p) for p in embeddings(model)}, _without_decay(model)
    groups: dict[str, list[Tensor]] = {"A": [], "embedding": [], "B": [], "B, no decay": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            of_b = "lora_B" in name or p.dim() == 1
            kind = "embedding" if id(p) in looked_up else "A" if not of_b else "B, no decay" if id(p) in free else "B"
            groups[kind].append(p)
    fast = lr * loraplus_lr_ratio
    settings = {"A": {"lr": lr} | decay, "embedding": {"lr": slow} | decay, "B": {"lr": fast} | decay}
    settings["B, no decay"] = {"lr": fast, "weight_decay": 0.0}
    return optimizer_cls([{"params": groups[kind]} | settings[kind] for kind in groups], lr=lr, **kwargs)  # type: ignore[call-arg]


def _without_decay(model: nn.Module) -> set[int]:
    """Biases, and all parameters of norms."""
    norms = (m for m in model.modules() if port(frozen(m)).op.kind == "norm")
    found = {id(p) for norm in norms for p in norm.parameters()}
    return found | {id(p) for name, p in model.named_parameters() if "bias" in name}

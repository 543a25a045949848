"""The low-rank products of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.inits._start import Started


def parts(model: nn.Module) -> list[Started]:
    """The adapters with a trained product B A, on layers where both are matrices."""
    found = [m for m in model.modules() if isinstance(m, Started) and m.lora_B.weight.requires_grad]
    if not found:
        raise ConfigError("the optimizer is for LoRA and what is built on it: the model trains no lora_A and lora_B")
    return [p for p in found if p.lora_A.weight.dim() == p.lora_B.weight.dim() == 2 and _kind(p) == "linear"]


def _kind(part: Any) -> str:
    return part.op.kind


def embeddings(model: nn.Module) -> Iterator[Tensor]:
    """The A and B of adapters on embeddings."""
    for module in model.modules():
        if isinstance(module, Started) and _kind(module) == "embedding":
            yield from (module.lora_A.weight, module.lora_B.weight)


def inverse(m: Tensor, damping: float) -> Tensor:
    """(m + damping 1)^-1 (r, r), in float32 or better; a pseudo-inverse where that is singular."""
    m = m.to(torch.promote_types(m.dtype, torch.float32))
    return torch.linalg.pinv(m + damping * torch.eye(len(m)).to(m))

"""What LoHa and LoKr share: their options, and dropout of whole rows and of whole updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.config import Excludes, Layers, Targets, in_range, option


@dataclass(kw_only=True)
class LycorisConfig(Targets, Excludes, Layers):
    r: int = option(8, "rank")
    alpha: int | float = option(8, "the update is scaled by alpha / r")
    rank_dropout: float = option(0.0, "share of the update's output rows that a training step leaves out")
    module_dropout: float = option(0.0, "share of the layers that a training step leaves without update")
    use_effective_conv2d: bool = option(False, "convolutions with a kernel: a core tensor instead of flat factors")
    rank_pattern: dict[str, int] | None = option(dict, "r by layer name or regex")
    alpha_pattern: dict[str, int | float] | None = option(dict, "alpha by layer name or regex")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("rank_dropout", self.rank_dropout, 0, 1)
        in_range("module_dropout", self.module_dropout, 0, 1)

    @property
    def drops(self) -> bool:
        return self.rank_dropout > 0 or self.module_dropout > 0

    def kept(self, out: int, y: Tensor, *, scale: bool) -> Tensor:
        """What a training step multiplies the update's outputs `y` with, (out). `scale`: so that their mean stays."""
        kept = (torch.rand(out, device=y.device) >= self.rank_dropout).to(y.dtype)
        if scale:
            kept = kept / kept.mean().clamp(min=1 / out)  # none left: nothing to scale
        return kept * (torch.rand((), device=y.device) >= self.module_dropout)


def core(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_ij t_ij a_i b_j (out, in, K) from t (r, r, *kernel), a (r, out) and b (r, in)."""
    return torch.einsum("ijk,ip,jq->pqk", t.flatten(2), a, b)

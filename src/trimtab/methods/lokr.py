"""LoKr: the Kronecker product of a small and a larger matrix, of which the larger may be of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import method, one_of, option
from trimtab.methods._low_rank import kaiming
from trimtab.methods._lycoris import LycorisConfig, core


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    decompose_both: bool = option(False, "low rank for the small matrix too, where that saves")
    decompose_factor: int = option(-1, "size of the small matrix; -1: the most square pair")
    rank_dropout_scale: bool = option(False, "keep the mean of the rows under rank_dropout")
    init_weights: bool | str = option(True, "true: the small matrix zero; lycoris: the larger one; false: all random")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("init_weights", self.init_weights, [True, False, "lycoris"])


def pair(n: int, factor: int) -> tuple[int, int]:
    """n as a product: with `factor` where it divides, else with the largest divisor below it and below sqrt(n)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    low = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0 and (d <= factor or factor == -1 or d == 1))
    return low, n // low


@method("LOKR", config=LoKrConfig, small={"r": 1})
class LoKr(Adapter):
    """W' = W + s W_1 ⊗ W_2,  s = alpha / r                                                              arXiv:2309.14859

    W_1 (l, m), W_2 (k, n, *kernel) with l k = out, m n = in (of a convolution with groups, in / groups). Each is one tensor,
    or, where r is below half its larger side, a product a b (W_1 only with `decompose_both`); of a convolution with
    `use_effective_conv2d`, sum_ij t_ij a_i b_j. W_1 starts at 0. Published 1-D convolutions with a whole W_2 stand for
    W_1[None] ⊗ W_2, read as (out, in, kernel).
    """

    additive = True

    def __init__(self, cfg: LoKrConfig, site: Site) -> None:
        super().__init__()
        site.need("LoKr", "linear", "embedding", "conv")
        (out, inn, *kernel), r, self.op, self.cfg = site.shape, site.pick(cfg.rank_pattern, cfg.r), site.base.op, cfg
        (l, k), (m, n) = pair(out, cfg.decompose_factor), pair(inn // self.op.groups, cfg.decompose_factor)
        self.s, points = site.pick(cfg.alpha_pattern, cfg.alpha) / r, math.prod(kernel)
        shapes: dict[str, tuple[int, ...]] = {"w1": (l, m)}
        if cfg.decompose_both and r < max(l, m) / 2:
            shapes = {"w1_a": (l, r), "w1_b": (r, m)}
        if r >= max(k, n) / 2:
            shapes |= {"w2": (k, n, *kernel)}
        elif cfg.use_effective_conv2d and points > 1:  # with two dimensions at least, as published
            shapes |= {"t2": (r, r, *kernel, *[1] * (2 - len(kernel))), "w2_a": (r, k), "w2_b": (r, n)}
        else:
            shapes |= {"w2_a": (k, r), "w2_b": (r, n * points)}
        last = ("w2", "w2_b") if cfg.init_weights == "lycoris" else ("w1", "w1_a") if cfg.init_weights else ()
        for name, shape in shapes.items():
            self.register_parameter(f"lokr_{name}", tensor := nn.Parameter(torch.zeros(shape)))
            if name not in last:
                kaiming(tensor, site, f"lokr_{name}")

    def factors(self) -> tuple[Tensor, Tensor]:
        """W_1 (l, m) and W_2 (k, n, *kernel), the kernel flat where W_2 is a product."""
        own: dict[str, Any] = self._parameters
        w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        if "lokr_w2" in own:
            return w1, own["lokr_w2"]
        a, b = own["lokr_w2_a"], own["lokr_w2_b"]
        return w1, core(own["lokr_t2"], a, b).flatten(1) if "lokr_t2" in own else a @ b

    def delta(self, w: Tensor) -> Tensor:
        w1, w2 = self.factors()
        if w2.dim() > 3:
            w1 = w1.view(*w1.shape, *[1] * (w2.dim() - 2))
        return self.s * self.op.full(torch.kron(w1, w2.contiguous()).reshape(len(w), -1)).view_as(w)

    def weight(self, w: Tensor) -> Tensor:
        return w + self.delta(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        drops, scale = self.training and self.cfg.drops, self.cfg.rank_dropout_scale
        if base.op.kind == "linear":  # W_2 and W_1 act one after the other on the inputs as an (m, n) grid
            w1, w2 = self.factors()
            h = F.linear(x.to(w2.dtype).unflatten(-1, (w1.shape[1], -1)), w2)  # (..., m, k)
            y = self.s * F.linear(h.mT.contiguous(), w1).mT.flatten(-2)
        elif not drops:
            return super().forward(x, base)
        else:
            y = base.op(x, self.delta(base.weight()))
        return base(x) + (y * base.op.out(self.cfg.kept(base.shape[0], y, scale=scale)) if drops else y)

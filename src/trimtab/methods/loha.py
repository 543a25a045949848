"""LoHa: the product, element by element, of two low-rank matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import method, option
from trimtab.methods._low_rank import kaiming
from trimtab.methods._lycoris import LycorisConfig, core


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    init_weights: bool = option(True, "true: the last factor zero; false: all random")


@method("LOHA", config=LoHaConfig, small={"r": 4})
class LoHa(Adapter):
    """W' = W + s (A_1 B_1) ∘ (A_2 B_2),  s = alpha / r                                arXiv:2108.06098, arXiv:2309.14859

    A_i (out, r), B_i (r, in * kernel); of a convolution with groups, in / groups. B_2 starts at 0. `use_effective_conv2d`:
    each product is sum_jk T_jk a_j b_k with a core T (r, r, *kernel), A_i (r, out), B_i (r, in).
    """

    additive = True

    def __init__(self, cfg: LoHaConfig, site: Site) -> None:
        super().__init__()
        site.need("LoHa", "linear", "embedding", "conv")
        (out, inn, *kernel), r, self.op, self.cfg = site.shape, site.pick(cfg.rank_pattern, cfg.r), site.base.op, cfg
        inn, points = inn // self.op.groups, math.prod(kernel)
        self.s = site.pick(cfg.alpha_pattern, cfg.alpha) / r
        self.core = cfg.use_effective_conv2d and points > 1
        a, b = ((r, out), (r, inn)) if self.core else ((out, r), (r, inn * points))
        self.hada_w1_a, self.hada_w1_b = nn.Parameter(torch.zeros(a)), nn.Parameter(torch.zeros(b))
        self.hada_w2_a, self.hada_w2_b = nn.Parameter(torch.zeros(a)), nn.Parameter(torch.zeros(b))
        if self.core:  # with two dimensions at least, as published
            t = (r, r, *kernel, *[1] * (2 - len(kernel)))
            self.hada_t1, self.hada_t2 = nn.Parameter(torch.zeros(t)), nn.Parameter(torch.zeros(t))
        for name, tensor in self.named_parameters():
            if name != "hada_w2_b" or not cfg.init_weights:
                kaiming(tensor, site, name)

    def delta(self, w: Tensor) -> Tensor:
        if self.core:
            first = core(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            second = core(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        else:
            first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return self.s * self.op.full((first * second).flatten(1)).view_as(w)

    def weight(self, w: Tensor) -> Tensor:
        return w + self.delta(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not (self.training and self.cfg.drops):
            return super().forward(x, base)
        y = base.op(x, self.delta(base.weight()))
        return base(x) + y * base.op.out(self.cfg.kept(base.shape[0], y, scale=True))

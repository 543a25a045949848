"""Uni-LoRA: every number of every low-rank factor is one of a few that the whole model shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, seeded
from trimtab.core.base import Base
from trimtab.core.config import Biases, FanIn, Layers, Targets, in_range, method, option
from trimtab.methods._low_rank import dropout, product


@dataclass(kw_only=True)
class UniLoraConfig(Targets, Layers, Biases, FanIn):
    r: int = option(4, "rank")
    proj_seed: int = option(42, "seed of what goes where")
    theta_d_length: int = option(256, "how many numbers are trained")
    unilora_dropout: float = option(0.0, "dropout on the input of the product")
    init_theta_d_bound: float = option(0.02, "they start uniform between minus this and this")
    init_weights: bool = option(True, "false: they start normal")
    save_indices: bool = option(False, "write what goes where into the file; it follows from the seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("theta_d_length", self.theta_d_length, 1)
        in_range("unilora_dropout", self.unilora_dropout, 0, 1)


class Theta(nn.Module):
    """The trained numbers, and for each site which of them its A and B take. Each is used equally often, up to one."""

    def __init__(self, cfg: UniLoraConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        d, bound, draw = cfg.theta_d_length, cfg.init_theta_d_bound, seeded(f"{sites[0].adapter}/theta_d")
        theta = torch.empty(d)
        theta = theta.uniform_(-bound, bound, generator=draw) if cfg.init_weights else theta.normal_(generator=draw)
        self.unilora_theta_d = nn.Parameter(theta)
        shapes = {s.name: ((cfg.r, math.prod(s.shape[1:])), (s.shape[0], cfg.r)) for s in sites}
        sizes = [math.prod(shape) for pair in shapes.values() for shape in pair]
        draws = np.random.default_rng(cfg.proj_seed)  # numpy's, as published adapters have it
        chosen = np.repeat(np.arange(d), sum(sizes) // d)
        if left := sum(sizes) % d:
            chosen = np.concatenate([chosen, draws.choice(d, size=left, replace=False)])
        draws.shuffle(chosen)
        parts = iter(torch.as_tensor(chosen, dtype=torch.long).split(sizes))
        self.indices = {name: [next(parts).view(shape).clone() for shape in pair] for name, pair in shapes.items()}
        self.counts = torch.as_tensor(chosen).bincount(minlength=d).float()


@method("UNILORA", config=UniLoraConfig, small={"r": 2, "theta_d_length": 16})
class UniLoRA(Adapter):
    """W' = W + B A,  A_ij = t_k / sqrt(n_k),  k = index_A(i, j), and so for B                             arXiv:2506.00799

    t (d) is trained and shared by all sites, drawn at the start; n_k counts how often t_k is taken in the whole model. The
    indices are a shuffle from `proj_seed` over all A and B in model order, so they depend on what is targeted.
    """

    additive, starts_at_base = True, False
    unilora_indices_A: Tensor
    unilora_indices_B: Tensor
    unilora_scales_A: Tensor
    unilora_scales_B: Tensor

    def __init__(self, cfg: UniLoraConfig, site: Site) -> None:
        super().__init__()
        self.shared: Any = site.shared
        self.drop = dropout(cfg.unilora_dropout, site)
        for letter, index in zip("AB", self.shared.indices[site.name], strict=True):
            self.register_buffer(f"unilora_indices_{letter}", index, persistent=cfg.save_indices)
            self.register_buffer(f"unilora_scales_{letter}", self.shared.counts[index].rsqrt(), persistent=cfg.save_indices)

    @classmethod
    def share(cls, cfg: UniLoraConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:
            site.need("Uni-LoRA", "linear", "embedding", "conv")
        return Theta(cfg, sites)

    def factors(self) -> tuple[Tensor, Tensor]:
        theta = self.shared.unilora_theta_d
        return theta[self.unilora_indices_A] * self.unilora_scales_A, theta[self.unilora_indices_B] * self.unilora_scales_B

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.factors()
        return w + (B @ A).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + product(self.drop(x), base, *self.factors())

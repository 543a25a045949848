"""HRA: the inputs are reflected, one after the other, at r trained hyperplanes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, Layers, Targets, in_range, method, option
from trimtab.errors import TrimtabWarning
from trimtab.methods._low_rank import precise


@dataclass(kw_only=True)
class HRAConfig(Targets, Excludes, Layers, Biases):
    r: int = option(8, "number of reflections; an even one starts as the base")
    apply_GS: bool = option(False, "make the hyperplanes orthogonal first (Gram-Schmidt); does not start as the base")
    init_weights: bool = option(True, "true: reflections in pairs that cancel; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        if self.r % 2 and self.init_weights and not self.inference_mode:
            warnings.warn(f"r={self.r} is odd: HRA starts away from the base, for no pair cancels", TrimtabWarning)


@method("HRA", config=HRAConfig, small={"r": 4})
class HRA(Adapter):
    """W' = W H_1 ... H_r,  H_i = I - 2 u_i u_i^T / |u_i|^2                                            arXiv:2405.17484

    The product is I - U S^-1 U^T, where S is U^T U above its diagonal and half of it there: two thin matrices, no r steps.
    `apply_GS`: W' = W (I - 2 Q Q^T), Q spanning U, which is S = U^T U / 2. U (in, r) holds the u_i. An embedding is
    reflected on its output.
    """

    def __init__(self, cfg: HRAConfig, site: Site) -> None:
        super().__init__()
        site.need("HRA", "linear", "embedding", "conv")
        self.orthogonal, self.on_output = cfg.apply_GS, site.kind == "embedding"
        self.point = site.kind == "linear" or self.on_output  # the input itself can be reflected
        n = site.shape[0] if self.on_output else math.prod(site.shape[1:])
        self.starts_at_base = cfg.init_weights and not cfg.apply_GS and cfg.r % 2 == 0
        half = torch.empty(n, cfg.r // 2 if self.starts_at_base else cfg.r)
        nn.init.kaiming_uniform_(half, a=5**0.5, generator=site.generator("hra_u"))
        self.hra_u = nn.Parameter(half.repeat_interleave(cfg.r // half.shape[1], 1))  # (in, r)

    def core(self) -> Tensor:
        """S^-1 (r, r)."""
        U = precise(self.hra_u)
        G = U.T @ U
        return torch.linalg.inv(G / 2 if self.orthogonal else G.triu(1) + G.diagonal().diag() / 2)

    def reflect(self, x: Tensor, S: Tensor) -> Tensor:
        """x (I - U S U^T) for the last dimension of x."""
        x, U = x.to(S.dtype), self.hra_u.to(S.dtype)
        return x - x @ U @ S @ U.T

    def weight(self, w: Tensor) -> Tensor:
        S = self.core()
        return self.reflect(w.T, S).T if self.on_output else self.reflect(w.flatten(1), S).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.point:
            return super().forward(x, base)
        S = self.core()
        return self.reflect(base(x), S) if self.on_output else base(self.reflect(x, S.T).to(x.dtype))

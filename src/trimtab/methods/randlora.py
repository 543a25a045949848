"""RandLoRA: a full-rank update as a trained sum of frozen random low-rank matrices, which all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, Tensors
from trimtab.core.base import Base
from trimtab.core.config import Biases, FanIn, Layers, Targets, in_range, method, option
from trimtab.methods._low_rank import dropout, product, widest

if TYPE_CHECKING:
    from trimtab.core.group import Group


@dataclass(kw_only=True)
class RandLoraConfig(Targets, Layers, Biases, FanIn):
    r: int = option(32, "rank of one random matrix; the smaller it is, the more numbers are trained")
    projection_prng_key: int = option(0, "seed of the random matrices")
    save_projection: bool = option(True, "write them into the adapter file")
    sparse: bool = option(False, "random matrices of -1, 0 and 1, of which two thirds are 0")
    very_sparse: bool = option(False, "the same with 0 for all but 1 / sqrt(smaller side)")
    randlora_dropout: float = option(0.0, "dropout on the input of the update")
    randlora_alpha: int | float = option(640, "the update is scaled by randlora_alpha / r")
    init_weights: bool = option(True, "true: lambda zero; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("randlora_dropout", self.randlora_dropout, 0, 1)


class Bases(nn.Module):
    """randlora_A (r, 1, smaller side) and randlora_B (larger side, n, r), each divided by its standard deviation."""

    def __init__(self, cfg: RandLoraConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        low, high = sorted(widest(sites))
        n, draw = math.ceil(low / cfg.r), torch.Generator().manual_seed(cfg.projection_prng_key)
        if cfg.sparse or cfg.very_sparse:
            edge = 1 / (2 * (low**0.5 if cfg.very_sparse else 3))
            A, B = torch.rand(cfg.r, 1, low, generator=draw), torch.rand(high, n, cfg.r, generator=draw)
            A, B = ((t > 1 - edge).float() - (t < edge).float() for t in (A, B))
        else:  # in bfloat16, as published adapters that rely on the seed have it
            A = self.uniform((cfg.r, 1, low), low, draw)
            B = torch.cat([self.uniform((high, 1, cfg.r), cfg.r, draw) for _ in range(n)], dim=1)
        self.register_buffer("randlora_A", (A / A.std()).float(), persistent=cfg.save_projection)
        self.register_buffer("randlora_B", (B / B.std()).float(), persistent=cfg.save_projection)

    def uniform(self, shape: tuple[int, ...], n: int, draw: torch.Generator) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-(n**-0.5), n**-0.5, generator=draw)


@method("RANDLORA", config=RandLoraConfig, small={"r": 3, "randlora_alpha": 6})
class RandLoRA(Adapter):
    """W' = W + s Q P  where in <= out, else  W + s (Q P)^T,  s = alpha / r                                arXiv:2502.00987

    P = lambda_ij A_i ∘ gamma_j (r n, low), row i n + j, and Q (high, n r), column j r + i, for low and high the smaller and the
    larger side and n = ceil(low / r). lambda (r, n), from 0, and gamma (n, low) are trained; A and Q are slices of what all
    sites share. The two orders of (i, j) differ in published adapters, so they do here.
    """

    additive = True

    def __init__(self, cfg: RandLoraConfig, site: Site) -> None:
        super().__init__()
        self.shared: Any = site.shared
        sides = site.shape[0], math.prod(site.shape[1:])
        (self.low, self.high), self.narrow, self.s = sorted(sides), sides[1] <= sides[0], cfg.randlora_alpha / cfg.r
        self.n, self.drop = math.ceil(self.low / cfg.r), dropout(cfg.randlora_dropout, site)
        self.randlora_lambda = nn.Parameter(torch.zeros(cfg.r, self.n))
        self.randlora_gamma = nn.Parameter(torch.full((self.n, self.low), 1 / max(self.n, self.low)))
        if not cfg.init_weights:
            nn.init.normal_(self.randlora_lambda, generator=site.generator("randlora_lambda"))
            nn.init.constant_(self.randlora_gamma, 1 / self.high)

    @classmethod
    def share(cls, cfg: RandLoraConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:
            site.need("RandLoRA", "linear", "embedding", "conv")
        return Bases(cfg, sites)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two maps whose product is (W' - W) / s: (r n, in) and (out, r n)."""
        A, B = self.shared.randlora_A[:, : self.n, : self.low], self.shared.randlora_B[: self.high, : self.n]
        P, Q = (self.randlora_lambda[..., None] * (A * self.randlora_gamma)).flatten(0, 1), B.flatten(1)
        return (P, Q) if self.narrow else (Q.T, P.T)

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.factors()
        return w + self.s * (B @ A).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + self.s * product(self.drop(x), base, *self.factors())

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        """Without the copies of what is shared that published files hold for each site."""
        own = {name: t for (path, name), t in tensors.items() if not path}
        return {k: t for k, t in tensors.items() if not (k[0] and k[1] in own and torch.equal(t, own[k[1]]))}

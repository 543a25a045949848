"""PVeRA: VeRA whose inner state is drawn from a distribution in training; its mean is the method afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, FanIn, Layers, Targets, in_range, method, option
from trimtab.errors import NotMergeable
from trimtab.methods._low_rank import Projections, dropout, mix, product, widest
from trimtab.targets import TARGETS


@dataclass(kw_only=True)
class PveraConfig(Targets, Layers, Biases, FanIn):
    r: int = option(256, "rank of the shared projections")
    projection_prng_key: int = option(0, "seed of the shared projections")
    save_projection: bool = option(True, "write them into the adapter file")
    pvera_dropout: float = option(0.0, "dropout on the input")
    d_initial: float = option(0.1, "start of d")
    init_weights: bool = option(True, "true: b starts at 0; false: random")
    sample_at_inference: bool = option(False, "draw after training too; it cannot be merged then", apart=True)
    generator_seed: int | None = option(None, "the noise comes from the CPU, and from this seed with torch's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("pvera_dropout", self.pvera_dropout, 0, 1)


@method("PVERA", config=PveraConfig, small={"r": 4})
class PVeRA(Adapter):
    """W' = W + diag(b) B diag(d) A                                                                        arXiv:2512.07703

    A (r, in) and B (out, r) are frozen slices of shared projections; d (r) and b (out) are trained, b starts at 0. In training
    diag(d) A x is but the mean m of z = m + e exp(v / 2), e ~ N(0, 1), and the log-variance is v = diag(d_v) A_v x: A_v and
    d_v are the second halves of the published pvera_A (2 r, in) and pvera_lambda_d (2 r).
    """

    additive, noisy = True, True
    targets = TARGETS | {"phi": ["q_proj", "v_proj"], "dinov2": ["query", "value"]}

    def __init__(self, cfg: PveraConfig, site: Site) -> None:
        super().__init__()
        self.shared: Any = site.shared
        self.out, self.inn, self.cfg = site.shape[0], math.prod(site.shape[1:]), cfg
        self.routed = cfg.sample_at_inference
        self.pvera_lambda_b = nn.Parameter(torch.zeros(self.out))
        self.pvera_lambda_d = nn.Parameter(torch.full((2 * cfg.r,), cfg.d_initial))
        self.drop = dropout(cfg.pvera_dropout, site)
        if not cfg.init_weights:
            nn.init.ones_(self.pvera_lambda_b)
            nn.init.normal_(self.pvera_lambda_d, generator=site.generator("pvera_lambda_d"))

    @classmethod
    def share(cls, cfg: PveraConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:
            site.need("PVeRA", "linear", "embedding", "conv")
        out, inn = widest(sites)
        shapes = {"pvera_A": (2 * cfg.r, inn), "pvera_B": (out, cfg.r)}
        return Projections(shapes, cfg.projection_prng_key, saved=cfg.save_projection)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (2 r, in), and diag(b) B (out, r)."""
        A = self.pvera_lambda_d[:, None] * self.shared.pvera_A[:, : self.inn]
        return A, self.pvera_lambda_b[:, None] * self.shared.pvera_B[: self.out]

    def weight(self, w: Tensor) -> Tensor:
        if self.cfg.sample_at_inference:
            raise NotMergeable("PVeRA with sample_at_inference draws at each call, which no weight does")
        A, B = self.factors()
        return w + (B @ A[: self.cfg.r]).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B = self.factors()
        if not (self.training or self.cfg.sample_at_inference):
            return base(x) + product(self.drop(x), base, A[: self.cfg.r], B)
        h = base.op(self.drop(x), A.reshape(-1, *base.shape[1:]))
        mean, variance = h.chunk(2, dim=1 - len(base.shape))
        z = mean + self.noise(mean) * torch.exp(variance / 2)
        return base(x) + mix(z, base, B)

    def noise(self, like: Tensor) -> Tensor:
        if self.cfg.generator_seed is None:
            return torch.randn_like(like)
        own = torch.Generator().manual_seed(self.cfg.generator_seed + int(torch.randint(2**31, ())))  # replayed with torch's
        return torch.randn(like.shape, generator=own, dtype=like.dtype).to(like.device)

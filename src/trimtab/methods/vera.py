"""VeRA: two random projections shared by all layers, and two trained vectors a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, FanIn, Layers, Targets, in_range, method, option
from trimtab.methods._low_rank import Projections, widest


@dataclass(kw_only=True)
class VeraConfig(Targets, Layers, Biases, FanIn):
    r: int = option(256, "rank of the shared projections")
    projection_prng_key: int = option(0, "seed of the shared projections")
    save_projection: bool = option(True, "write them into the adapter file")
    vera_dropout: float = option(0.0, "dropout on the input")
    d_initial: float = option(0.1, "start of d")
    init_weights: bool = option(True, "true: b starts at 0; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("vera_dropout", self.vera_dropout, 0, 1)


@method("VERA", config=VeraConfig, small={"r": 4})
class VeRA(Adapter):
    """W' = W + diag(b) B diag(d) A                                                            arXiv:2310.11454, eq. 2

    A (r, in) and B (out, r) are frozen slices of the shared projections; d (r) and b (out) are trained, b starts at 0.
    """

    additive = True

    def __init__(self, cfg: VeraConfig, site: Site) -> None:
        super().__init__()
        site.need("VeRA", "linear")
        assert isinstance(site.shared, Projections)
        self.shared, (self.out, self.inn) = site.shared, site.shape
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out))
        self.vera_lambda_d = nn.Parameter(torch.full((cfg.r,), cfg.d_initial))
        self.drop = nn.Dropout(cfg.vera_dropout)
        if not cfg.init_weights:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d, generator=site.generator("vera_lambda_d"))

    @classmethod
    def share(cls, cfg: VeraConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:
            site.need("VeRA", "linear")
        out, inn = widest(sites)
        shapes = {"vera_A": (cfg.r, inn), "vera_B": (out, cfg.r)}
        return Projections(shapes, cfg.projection_prng_key, saved=cfg.save_projection)

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self.vera_lambda_d[:, None] * self.shared.vera_A[:, : self.inn]  # type: ignore[attr-defined]
        return A, self.vera_lambda_b[:, None] * self.shared.vera_B[: self.out]  # type: ignore[attr-defined]

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.factors()
        return w + B @ A

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B = self.factors()
        return base(x) + base.op.mix(base.op(self.drop(x), A), B)

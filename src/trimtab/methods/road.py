"""RoAd: the outputs are rotated and scaled in pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Targets, method, one_of, option
from trimtab.errors import ConfigError, NotSupported

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # numbers of theta and of alpha an output


@dataclass(kw_only=True)
class RoadConfig(Targets):
    variant: str = option(
        "road_1",
        "road_1, road_2 or road_4: one, two or four pairs of numbers for two outputs",
        choices=("road_2", "road_4"),
    )
    group_size: int = option(64, "outputs whose halves are paired; even, and it divides the outputs")
    init_weights: bool = option(True, "true: no rotation at the start; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("variant", self.variant, [*_SIZES])
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(f"group_size={self.group_size}: an even number, for outputs are paired within a group")


@method("ROAD", config=RoadConfig, small={"group_size": 4})
class RoAd(Adapter):
    """W' = R W,  b' = R b,  R h = alpha cos(theta) h + alpha sin(theta) J h                           arXiv:2409.00119

    J [h1, h2] = [-h2, h1] on the two halves of each group of outputs. theta (0) and alpha (1): one for each pair (road_1),
    for each output (road_2), or for each output and each of the two terms (road_4).
    """

    def __init__(self, cfg: RoadConfig, site: Site) -> None:
        super().__init__()
        site.need("RoAd", "linear", "embedding", "conv")
        out, self.group, self.variant = site.shape[0], cfg.group_size, cfg.variant
        if out % self.group:
            raise NotSupported(f"RoAd on {site.name!r}: group_size={self.group} does not divide its {out} outputs")
        self.channels = -1 if site.kind != "conv" else 1 - len(site.shape)  # the dimension of outputs in y
        self.road_theta, self.road_alpha = (
            nn.Parameter(torch.full((int(out * _SIZES[cfg.variant]),), v)) for v in (0.0, 1.0)
        )
        if not cfg.init_weights:
            nn.init.normal_(self.road_theta, std=0.5, generator=site.generator("road_theta"))
            nn.init.normal_(self.road_alpha, mean=1, std=0.5, generator=site.generator("road_alpha"))

    def columns(self) -> tuple[Tensor, Tensor]:
        """alpha cos(theta) and alpha sin(theta), both (out)."""
        theta, alpha, g = self.road_theta, self.road_alpha, self.group
        if self.variant == "road_1":
            theta, alpha = (v.view(-1, 1, g // 2).expand(-1, 2, -1).flatten() for v in (theta, alpha))
        if self.variant == "road_4":
            theta, alpha = (v.view(-1, 2, g).transpose(0, 1).flatten(1) for v in (theta, alpha))
            return alpha[0] * theta[0].cos(), alpha[1] * theta[1].sin()
        return alpha * theta.cos(), alpha * theta.sin()

    def rotate(self, h: Tensor, dim: int) -> Tensor:
        """R h along one dimension."""
        h = h.movedim(dim, -1)
        h1, h2 = h.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        c, s = self.columns()
        return (c * h + s * torch.stack([-h2, h1], -2).flatten(-3)).movedim(-1, dim)

    def weight(self, w: Tensor) -> Tensor:
        return self.rotate(w, 0)

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        return b if b is None else self.rotate(b, 0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.rotate(base(x), self.channels)

"""HiRA: the frozen weight times a low-rank matrix, element by element, so that the update has a high rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Excludes, FanIn, Layers, Targets, in_range, method, one_of, option
from trimtab.methods._low_rank import dropout, kaiming


@dataclass(kw_only=True)
class HiraConfig(Targets, Excludes, Layers, FanIn):
    r: int = option(32, "rank of the factor")
    hira_dropout: float = option(0.0, "dropout on the input of the update")
    init_weights: bool | str | None = option(True, "true: A random, B zero; gaussian; false: both random")
    rank_pattern: dict[str, int] | None = option(dict, "r by layer name or regex")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("hira_dropout", self.hira_dropout, 0, 1)
        one_of("init_weights", self.init_weights, [True, False, None, "gaussian"])


@method("HIRA", config=HiraConfig, small={"r": 4})
class HiRA(Adapter):
    """W' = W + W ∘ (B A)

    ICLR 2025, openreview.net/forum?id=TwJrTz9cRS. A (r, in, *kernel) starts random, B (out, r) at 0; on an embedding A
    does. What is 0 in W stays 0: groups of a convolution stay apart. B's published shape there is (out, r, 1, ...).
    """

    def __init__(self, cfg: HiraConfig, site: Site) -> None:
        super().__init__()
        site.need("HiRA", "linear", "embedding", "conv")
        (out, *fan_in), r = site.shape, site.pick(cfg.rank_pattern, cfg.r)
        lookup = site.kind == "embedding"
        self.names = {"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"} if lookup else {}
        self.hira_A = nn.Parameter(torch.zeros(r, *fan_in))
        self.hira_B = nn.Parameter(torch.zeros(out, r, *[1] * (len(fan_in) - 1)))
        self.drop = dropout(cfg.hira_dropout, site)
        if not cfg.init_weights or lookup:
            nn.init.normal_(self.hira_B, generator=site.generator("hira_B"))
        if not cfg.init_weights or (cfg.init_weights == "gaussian" and not lookup):
            nn.init.normal_(self.hira_A, std=1 / r if cfg.init_weights else 1, generator=site.generator("hira_A"))
        elif not lookup:
            kaiming(self.hira_A, site, "hira_A")

    def delta(self, w: Tensor) -> Tensor:
        return w * (self.hira_B.flatten(1) @ self.hira_A.flatten(1)).view_as(w)

    def weight(self, w: Tensor) -> Tensor:
        return w + self.delta(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + base.op(self.drop(x), self.delta(base.weight()))

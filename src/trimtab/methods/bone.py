"""Bone: what MiSS was called before. Adapters that were published under the old name are read, trained and written as such."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, Layers, Targets, in_range, method, one_of, option
from trimtab.methods.miss import MiSS, MissConfig


@dataclass(kw_only=True)
class BoneConfig(Targets, Excludes, Layers, Biases):
    r: int = option(64, "inputs of a shard; bat: size of a block, which divides inputs and outputs")
    init_weights: bool | str = option(True, "true: start as the base; false: random; or bat", choices=("bat",))

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        one_of("init_weights", self.init_weights, [True, False, "bat"])


@method("BONE", config=BoneConfig, small={"r": 4})
class Bone(Adapter):
    """W' = W + [M^T M^T ... M^T];  bat: W'_ij = W_ij + W_ij M_i + M_i                                 arXiv:2409.15371"""

    names = {"miss.miss_block": "bone_block"}
    additive = True

    def __init__(self, cfg: BoneConfig, site: Site) -> None:
        super().__init__()
        self.miss = MiSS(MissConfig(r=cfg.r, init_weights=cfg.init_weights), site)
        self.additive = self.miss.additive

    def weight(self, w: Tensor) -> Tensor:
        return self.miss.weight(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.miss(x, base)

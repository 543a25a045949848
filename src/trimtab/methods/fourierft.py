"""FourierFT: the change of the weight is a sum of few waves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, in_range, method, option
from trimtab.errors import NotSupported
from trimtab.methods._low_rank import precise
from trimtab.targets import TARGETS


@dataclass(kw_only=True)
class FourierFTConfig(Targets, Excludes, Layers, Biases, FanIn):
    n_frequency: int = option(1000, "number of waves")
    scaling: float = option(150.0, "the change is scaled by this")
    random_loc_seed: int = option(777, "seed of which frequencies they have")
    n_frequency_pattern: dict[str, int] = option(dict, "n_frequency by layer name or regex")
    init_weights: bool = option(False, "true: start as the base; false: random waves, as published")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("n_frequency", self.n_frequency, 1)


@lru_cache(maxsize=64)
def places(size: int, n: int, seed: int) -> Tensor:
    """n of the numbers below `size`: the same ones in all layers of one size, as published adapters have them."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n].clone()


def count(site: Site, method: str, n: int) -> int:
    """n, if the layer has so many numbers."""
    if not 0 < n <= math.prod(site.shape):
        raise NotSupported(f"{method} on {site.name!r}: n_frequency={n}, and it has {math.prod(site.shape)} weights")
    return n


@method("FOURIERFT", config=FourierFTConfig, small={"n_frequency": 24, "init_weights": True})
class FourierFT(Adapter):
    """W' = W + scaling Re(ifft2(F)),  F zero but for n entries                                        arXiv:2405.03003

    F (out, in); its entries c (n) are trained, where they stand is drawn once from a seed and not saved.
    """

    additive = True
    targets = TARGETS | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}
    places: Tensor

    def __init__(self, cfg: FourierFTConfig, site: Site) -> None:
        super().__init__()
        site.need("FourierFT", "linear", "embedding", "conv")
        n = count(site, "FourierFT", site.pick(cfg.n_frequency_pattern, cfg.n_frequency))
        self.scaling, self.starts_at_base = cfg.scaling, cfg.init_weights
        self.shape = site.shape[0], math.prod(site.shape[1:])
        self.register_buffer("places", places(math.prod(self.shape), n, cfg.random_loc_seed), persistent=False)
        self.fourierft_spectrum = nn.Parameter(torch.zeros(n))
        if not cfg.init_weights:
            nn.init.normal_(self.fourierft_spectrum, generator=site.generator("fourierft_spectrum"))

    def weight(self, w: Tensor) -> Tensor:
        c = precise(self.fourierft_spectrum)
        F = c.new_zeros(math.prod(self.shape)).index_copy(0, self.places, c).view(self.shape)
        return w + self.scaling * torch.fft.ifft2(F).real.view_as(w)

"""WaveFT: the change of the weight has few wavelet coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, in_range, method, one_of, option
from trimtab.methods._wavelets import NAMES, low_pass
from trimtab.methods.fourierft import count, places
from trimtab.targets import TARGETS


@dataclass(kw_only=True)
class WaveFTConfig(Targets, Excludes, Layers, Biases, FanIn):
    n_frequency: int = option(2592, "number of coefficients")
    scaling: float = option(25.0, "the change is scaled by this")
    wavelet_family: str = option("db1", "db1-db34, sym2-sym10, coif1-coif3", choices=("db3", "sym4", "coif1"))
    use_idwt: bool = option(True, "false: the coefficients themselves are the change")
    random_loc_seed: int = option(777, "seed of where they stand")
    n_frequency_pattern: dict[str, int] = option(dict, "n_frequency by layer name or regex")
    proportional_parameters: bool = option(False, "share the coefficients of all layers out by their sizes")
    init_weights: bool = option(True, "true: start as the base; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("n_frequency", self.n_frequency, 1)
        one_of("wavelet_family", self.wavelet_family, NAMES)


class Budget(nn.Module):
    """How many coefficients each layer gets: n_frequency a layer on average, in proportion to the layers' sizes."""

    def __init__(self, n: int, sites: Sequence[Site]) -> None:
        super().__init__()
        sizes = {site.name: math.prod(site.shape) for site in sites}
        self.counts = {k: max(1, round(v / sum(sizes.values()) * n * len(sizes))) for k, v in sizes.items()}


@method("WAVEFT", config=WaveFTConfig, small={"n_frequency": 24})
class WaveFT(Adapter):
    """W' = W + scaling IDWT(F),  F zero but for n entries                                             arXiv:2505.12532

    One level of the inverse 2-D wavelet transform; F is (out, in) and a margin as wide as the filter, all of it in four
    quarters: low-low, high-low, low-high and high-high, the rows' filter first. Its entries (n) are trained, where they
    stand is drawn once from a seed and not saved.
    """

    additive = True
    targets = {k: v for k, v in TARGETS.items() if k not in ("btlm", "rwkv", "rwkv7")}
    targets |= {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}
    places: Tensor
    filters: Tensor

    def __init__(self, cfg: WaveFTConfig, site: Site) -> None:
        super().__init__()
        site.need("WaveFT", "linear", "embedding", "conv")
        shared = site.shared
        n = (
            shared.counts[site.name]
            if isinstance(shared, Budget)
            else site.pick(cfg.n_frequency_pattern, cfg.n_frequency)
        )
        self.scaling, self.shape = cfg.scaling, (site.shape[0], math.prod(site.shape[1:]))
        at = places(math.prod(self.shape), count(site, "WaveFT", n), cfg.random_loc_seed)
        low = low_pass(cfg.wavelet_family) if cfg.use_idwt else torch.ones(0)
        high = low.flip(0) * (-1.0) ** torch.arange(len(low))
        margin = max(len(low) - 2, 0)
        self.wide = [s + margin + (s % 2 if cfg.use_idwt else 0) for s in self.shape]
        top, left = ((w - s) // 2 for w, s in zip(self.wide, self.shape, strict=True))
        at = (at // self.shape[1] + top) * self.wide[1] + at % self.shape[1] + left
        self.register_buffer("places", at, persistent=False)
        pairs = [torch.outer(a, b) for b in (low, high) for a in (low, high)]
        self.register_buffer("filters", torch.stack(pairs)[:, None], persistent=False)  # (4, 1, length, length)
        self.waveft_spectrum = nn.Parameter(torch.zeros(n))
        if not cfg.init_weights:
            nn.init.normal_(self.waveft_spectrum, std=0.01, generator=site.generator("waveft_spectrum"))

    @classmethod
    def share(cls, cfg: WaveFTConfig, sites: Sequence[Site]) -> nn.Module | None:
        return Budget(cfg.n_frequency, sites) if cfg.proportional_parameters else None

    def change(self) -> Tensor:
        c = self.waveft_spectrum
        F = c.new_zeros(math.prod(self.wide)).index_copy(0, self.places, c).view(*self.wide)
        if not self.filters.numel():
            return F
        quarters = (
            F.unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        )  # (4, rows / 2, columns / 2)
        full = nn.functional.conv_transpose2d(quarters[None], self.filters, stride=2)[0, 0]
        top, left = ((f - s) // 2 for f, s in zip(full.shape, self.shape, strict=True))
        return full[top : top + self.shape[0], left : left + self.shape[1]]

    def weight(self, w: Tensor) -> Tensor:
        return w + self.scaling * self.change().reshape_as(w)

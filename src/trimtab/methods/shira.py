"""SHiRA: a small, fixed set of the weight's entries is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import FanIn, Targets, in_range, method, option
from trimtab.errors import NotSupported
from trimtab.targets import TARGETS


@dataclass(kw_only=True)
class ShiraConfig(Targets, FanIn):
    r: int = option(32, "r (in + out) entries are trained, as many as in a LoRA of this rank")
    mask_type: str = option("random", "random, or a name for what the function `mask_fn` of the config chooses")
    random_seed: int | None = option(None, "seed of the random choice; none: a fixed one")
    init_weights: bool = option(True, "true: start as the base; false: random")
    mask_fn: Any = option(None, "function (layer, r) -> 0/1 mask (out, in); not saved, its choice is", later=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "mask_fn"}


def raised(w: Tensor, flat: Tensor, v: Tensor) -> Tensor:
    """The weight with v added to its entries `flat`, counted row by row."""
    return w.to(v.dtype).flatten().index_add(0, flat, v).view_as(w)


def applied(x: Tensor, base: Base, flat: Tensor, v: Tensor) -> Tensor:
    """What the base answers with the weight so raised. Sparse products lose to a copy of the weight and a dense product,
    unless tokens are few (measured on a CPU); then each entry is applied by itself, and 4-bit weights stay 4-bit."""
    inn = math.prod(base.shape[1:])
    if base.op.kind == "linear" and 16 * math.prod(x.shape[:-1]) * len(v) < inn * base.shape[0]:
        return base(x).to(v.dtype).index_add(-1, flat // inn, x[..., flat % inn] * v)
    return base.op(x, raised(base.weight(), flat, v), base.bias())


@method("SHIRA", config=ShiraConfig, small={"r": 2})
class SHiRA(Adapter):
    """W' = W + scatter(indices, v)                                                                    arXiv:2406.13175

    v (r (in + out)) starts at 0; indices (2, r (in + out)), rows and columns, are chosen once and saved.
    """

    additive = True
    targets = TARGETS | {"phi": ["q_proj", "v_proj"]}
    shira_indices: Tensor

    def __init__(self, cfg: ShiraConfig, site: Site) -> None:
        super().__init__()
        site.need("SHiRA", "linear", "embedding", "conv")
        out, self.inn = site.shape[0], math.prod(site.shape[1:])
        n = cfg.r * (out + self.inn)
        if n > out * self.inn:
            raise NotSupported(f"SHiRA on {site.name!r}: r={cfg.r} asks for {n} entries of a weight {out} x {self.inn}")
        flat = self.chosen(cfg, site, n)
        if len(flat) != n:
            raise NotSupported(f"SHiRA on {site.name!r}: mask_fn chose {len(flat)} entries, and r={cfg.r} means {n}")
        self.register_buffer("shira_indices", torch.stack([flat // self.inn, flat % self.inn]).int())
        self.shira_weight = nn.Parameter(torch.zeros(n))
        if not cfg.init_weights:
            nn.init.normal_(self.shira_weight, generator=site.generator("shira_weight"))

    def chosen(self, cfg: ShiraConfig, site: Site, n: int) -> Tensor:
        if cfg.mask_fn is not None:
            return cfg.mask_fn(site.base.layer, cfg.r).reshape(-1).nonzero().flatten()
        if cfg.mask_type == "random":
            draw = torch.Generator() if cfg.random_seed is None else torch.Generator().manual_seed(cfg.random_seed)
            return torch.randperm(math.prod(site.shape), generator=draw)[:n].sort().values
        if not cfg.inference_mode:
            raise NotSupported(
                f"SHiRA on {site.name!r}: mask_type={cfg.mask_type!r} needs a function in config.mask_fn"
            )
        return torch.zeros(n, dtype=torch.long)  # the file has them

    @property
    def flat(self) -> Tensor:
        return self.shira_indices[0].long() * self.inn + self.shira_indices[1]

    def weight(self, w: Tensor) -> Tensor:
        return raised(w, self.flat, self.shira_weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return applied(x, base, self.flat, self.shira_weight)

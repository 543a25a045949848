"""Lily: layers of the same role share their up-projections and mix them by what comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Factor, Site, Tensors
from trimtab.core.base import Base
from trimtab.core.config import Excludes, Layers, Targets, in_range, method, option
from trimtab.core.sites import ALL_LINEAR, ends_with
from trimtab.errors import NotMergeable, NotSupported
from trimtab.methods._low_rank import kaiming

if TYPE_CHECKING:
    from trimtab.core.group import Group


@dataclass(kw_only=True)
class LilyConfig(Targets, Excludes, Layers):
    r: int = option(32, "rank")
    stride_A: int = option(1, "neighbouring layers of one role that share their A")
    num_B: int = option(2, "up-projections that all layers of one role share")
    scaling: float = option(1.0, "the update is scaled by it")
    init_weights: bool = option(True, "true: A random, B zero; false: both random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("stride_A", self.stride_A, 1)
        in_range("num_B", self.num_B, 2)


class Pools(nn.Module):
    """A and B by site, one object where they are shared. Kept apart from modules: each site has them under its own name."""

    def __init__(self, cfg: LilyConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.factors: dict[str, tuple[Factor, Factor]] = {}
        roles: dict[Any, list[Factor]] = {}
        for site in sites:
            role = (self.role(cfg, site.name), *site.shape)
            held = roles.setdefault(role, [Factor(cfg.num_B * cfg.r, site.shape[0])])  # B, then the A of every run
            if len(held) == 1 and not cfg.init_weights:
                kaiming(held[0].weight, site, "lily_B")
            if sum(self.role(cfg, n) == role[0] and f[1] is held[0] for n, f in self.factors.items()) % cfg.stride_A == 0:
                held.append(Factor(cfg.r, *site.shape[1:]))
                kaiming(held[-1].weight, site, "lily_A")
            self.factors[site.name] = (held[-1], held[0])

    def role(self, cfg: LilyConfig, name: str) -> str:
        """The target that names the layer: the longest, where several do."""
        if isinstance(cfg.target_modules, str):
            return name.rpartition(".")[2] if cfg.target_modules == ALL_LINEAR else cfg.target_modules
        return max((t for t in cfg.target_modules or [] if ends_with(name, t)), key=len, default=name)


@method("LILY", config=LilyConfig, small={"r": 4})
class Lily(Adapter):
    """y = W x + s (sum_e p_e B_e) A x,  p = mean over all tokens of softmax(R A x)                        arXiv:2407.09946

    A (r, in), one for each run of `stride_A` layers; B_e (out, r), e = 1 .. num_B, from 0, one set for all layers of a role
    and shape, published as (num_B r, out); R (num_B, r), one a layer. p is one for the whole call, padding included, so a row's
    answer depends on the rows beside it, and there is no weight that would do the same.
    """

    routed = True

    def __init__(self, cfg: LilyConfig, site: Site) -> None:
        super().__init__()
        assert isinstance(site.shared, Pools)
        self.lily_A, self.lily_B = site.shared.factors[site.name]
        self.lily_router, self.s = Factor(cfg.num_B, cfg.r), cfg.scaling
        kaiming(self.lily_router.weight, site, "lily_router")

    @classmethod
    def share(cls, cfg: LilyConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:
            site.need("Lily", "linear", "embedding", "conv")
            if site.base.op.groups > 1:
                raise NotSupported(f"Lily does not fit {site.name!r}: its B would mix the groups of a convolution layer")
        return Pools(cfg, sites)

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("Lily depends on its input: it has no weight to merge, or for a method after it to read")

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h, axis = base.op(x, self.lily_A.weight), 1 - len(base.shape)  # the channels of h
        p = base.op.mix(h, self.lily_router.weight).movedim(axis, -1).softmax(-1).flatten(0, -2).mean(0)
        B = torch.einsum("e,eio->oi", p, self.lily_B.weight.unflatten(0, (len(p), -1)))
        return base(x) + self.s * base.op.mix(h, B)

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        """A file may hold layers that share nothing: then those of one role part here too."""
        first: dict[tuple[int, str], Tensor] = {}
        for path, own in group.each(cls):
            for name in ("lily_A", "lily_B"):
                held, given = getattr(own, name), tensors.get((path, f"{name}.weight"))
                if given is not None and not torch.equal(first.setdefault((id(held), name), given), given):
                    apart = Factor(*held.weight.shape).to(held.weight)
                    setattr(own, name, apart.requires_grad_(held.weight.requires_grad))
        return tensors

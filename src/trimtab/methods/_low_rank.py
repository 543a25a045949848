"""What methods with a low-rank update share: B A x on every kind of layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.core.base import Base
from trimtab.targets import TARGETS

_ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
WIDE: dict[str, list[str]] = TARGETS | {  # default targets of methods that go everywhere, where not LoRA's
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": _ALL,
    "opt": _ALL,
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}


def mix(y: Tensor, base: Base, m: Tensor) -> Tensor:
    """m (out, r) along the channels of y, also where the layer's own channels are in groups."""
    if base.op.groups == 1:
        return base.op.mix(y, m)
    axis = 1 - len(base.shape)
    return F.linear(y.movedim(axis, -1).contiguous(), m).movedim(-1, axis)


def product(x: Tensor, base: Base, A: Tensor, B: Tensor) -> Tensor:
    """B A x for A (r, in, *kernel), also flattened, and B (out, r)."""
    return mix(base.op(x, A.reshape(-1, *base.shape[1:])), base, B)


def weight_of(site: Site) -> Tensor:
    """The weight that an adapter is made for, (out, in, *kernel), in float32 at least."""
    return precise(site.base.weight().detach())


def precise(t: Tensor) -> Tensor:
    """In float32 at least: torch solves, inverts, decomposes and transforms nothing in 16 bits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def dropout(p: float, site: Site) -> nn.Module:
    """Dropout on the input of an update. Token ids cannot be dropped."""
    return nn.Dropout(p) if site.kind != "embedding" else nn.Identity()


def kaiming(tensor: Tensor, site: Site, name: str) -> None:
    """U(-1 / sqrt(n), 1 / sqrt(n)) for n inputs, as torch's own Linear starts."""
    nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=site.generator(name))


class Projections(nn.Module):
    """Frozen random matrices that all sites share: Kaiming-uniform, drawn in order from a seed alone."""

    def __init__(self, shapes: dict[str, tuple[int, int]], seed: int, *, saved: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            bound = (6 / shape[1]) ** 0.5
            self.register_buffer(name, torch.empty(shape).uniform_(-bound, bound, generator=draw), persistent=saved)


def widest(sites: Sequence[Site]) -> tuple[int, int]:
    """The largest (out, in * kernel) of all sites."""
    return max(s.shape[0] for s in sites), max(math.prod(s.shape[1:]) for s in sites)

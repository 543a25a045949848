"""What methods with a low-rank update share: B A x on every kind of layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.core.base import Base


def product(x: Tensor, base: Base, A: Tensor, B: Tensor) -> Tensor:
    """B A x for A (r, in, *kernel), also flattened, and B (out, r). Two thin maps; where a convolution has groups, which B
    mixes, one dense map."""
    A = A.view(-1, *base.shape[1:])
    if base.op.groups == 1:
        return base.op.mix(base.op(x, A), B)
    return base.op(x, (B @ A.flatten(1)).view(base.shape))


def frozen(site: Site) -> Tensor:
    """The weight that an adapter is made for, (out, in, *kernel), in float32 at least."""
    w = site.base.weight().detach()
    return w.to(torch.promote_types(w.dtype, torch.float32))


def dropout(p: float, site: Site) -> nn.Module:
    """Dropout on the input of an update. Token ids cannot be dropped."""
    return nn.Dropout(p) if site.kind != "embedding" else nn.Identity()


def kaiming(tensor: Tensor, site: Site, name: str) -> None:
    """U(-1 / sqrt(n), 1 / sqrt(n)) for n inputs, as torch's own Linear starts."""
    nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=site.generator(name))

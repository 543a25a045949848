"""Adapters that are no method: a trained copy of a module (`modules_to_save`) and a trained bias (`bias="all"`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from trimtab import masters
from trimtab.core.adapter import Adapted, Adapter, Site
from trimtab.core.base import Base
from trimtab.errors import NotSupported


class FullTune(Adapter):
    """y = copy(x): the module is copied whole and the copy is trained, in float32; the original stays what it was."""

    names = {"copy.": ""}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.copy = copy.deepcopy(site.base.layer).requires_grad_(True)

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        return masters.called(self.copy, base.layer, x, *args, **kwargs)

    def merged(self, site: Adapted) -> nn.Module:
        return masters.rounded(copy.deepcopy(self.copy), site.base.layer)


class BiasTune(Adapter):
    """b' = b*, a trained copy of the layer's bias."""

    def __init__(self, site: Site, *, alone: bool) -> None:
        super().__init__()
        bias = site.base.bias()
        if bias is None or site.kind == "module":
            raise NotSupported(f"the bias of {site.name!r} ({type(site.base.layer).__name__}) cannot be trained")
        self.value = nn.Parameter(bias.detach().clone())
        self.names = {"value": "bias" if alone else "base_layer.bias"}

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor:
        return self.value

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        return base(x) + base.op.out(self.value - base.bias())  # type: ignore[operator] # it has one: see __init__

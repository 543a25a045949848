"""`AdapterLayer`: the only wrapper class in the library. A frozen layer, its adapters by name, the active stack."""

from __future__ import annotations

import inspect
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import masters
from trimtab.call import Call
from trimtab.core.adapter import Adapted, Adapter, Site
from trimtab.core.base import Base, port
from trimtab.core.ops import OpaqueOp
from trimtab.errors import NotMergeable


class Named(nn.ModuleDict):
    """A ModuleDict whose keys may be any name without a dot, `keys` and `train` included."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]


class Both(Adapter):
    """Two adapters of one name at one site, the first innermost: a method and the site's trained bias."""

    def __init__(self, first: Adapter, second: Adapter) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.names = {f"{own}.{k}": v for own in ("first", "second") for k, v in getattr(self, own).names.items()}
        self.names |= {"first.": "", "second.": ""}

    def weight(self, w: Tensor) -> Tensor:
        return self.second.weight(self.first.weight(w))

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        return self.second.bias(self.first.bias(b, w), self.first.weight(w))

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        return self.second(x, Adapted(base, self.first), *args, **kwargs)


class AdapterLayer(nn.Module):
    """Calls the stack of its active adapters over `base_layer`; merged, `base_layer` is a rebuilt one and the old is kept."""

    def __init__(self, layer: nn.Module, path: str = "", call: Call | None = None) -> None:
        super().__init__()
        self.base_layer, self.adapters = layer, Named()
        self.path, self.call = path, call or Call()
        self.active: tuple[str, ...] = ()
        self.merged_adapters: tuple[str, ...] = ()
        self.disabled = False
        self.kept: list[nn.Module] = []  # the original layer while merged; in a list, so that it is no submodule
        self.port = self.stack_ = port(layer)
        self.first = next(iter(inspect.signature(layer.forward).parameters), "")

    def stack(self, names: tuple[str, ...]) -> Base:
        return reduce(Adapted, (self.adapters[n] for n in names if n in self.adapters), self.port)  # type: ignore[arg-type]

    def restack(self) -> None:
        """Recompute the stack; called when what is active changes, not per call."""
        bare = port(self.kept[0]) if self.kept else self.port
        self.stack_ = bare if self.disabled else self.stack(tuple(n for n in self.active if n not in self.merged_adapters))

    def add(self, name: str, adapter: Adapter, site: Site, *, full_precision: bool = True) -> None:
        """Put `adapter` on; it is born on the layer's device, in float32 unless the layer computes in float64."""
        dtype = masters.born(site.base.dtype, full_precision)
        own = site.kind == "module" and not adapter.on_modules  # a copy of the module
        adapter.train(self.training).to(device=site.base.device, dtype=None if own else dtype)
        masters.raised(adapter, own and full_precision)
        self.adapters[name] = Both(adapter, self.adapters[name]) if name in self.adapters else adapter  # type: ignore[arg-type]

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self.activate(tuple(n for n in self.active if n != name))

    def activate(self, names: tuple[str, ...]) -> None:
        if self.kept:
            self.unmerge()
        self.active = tuple(n for n in names if n in self.adapters)
        self.restack()

    def mergeable(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The active ones of `names`, if merging them leaves the function as it is: they come first, or order is nothing."""
        pick = tuple(n for n in self.active if n in names and n not in self.merged_adapters)
        for n in pick:
            before = [m for m in self.active[: self.active.index(n)] if m not in (*pick, *self.merged_adapters)]
            if before and not all(self.adapters[m].additive for m in (n, *before)):  # type: ignore[union-attr]
                raise NotMergeable(f"adapter {n!r} stands after {before[0]!r}, and the two do not commute: merge both")
        return pick

    def merge(self, names: tuple[str, ...], *, safe: bool = False) -> None:
        if not (names := self.mergeable(names)):
            return
        top: Any = self.stack(names)
        layer = top.adapter.merged(top)  # one rebuild for all of them: rounded once
        if safe and not all(torch.isfinite(p).all() for p in layer.parameters() if p.is_floating_point()):
            raise NotMergeable(f"merging {', '.join(names)} gives weights that are not finite")
        self.kept = self.kept or [self.base_layer]
        self.merged_adapters += names
        self.base_layer, self.port = layer, port(layer)
        self.restack()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # `to`, `half`, `cuda`: what is kept goes along
        self.kept = [layer._apply(fn) for layer in self.kept]  # pyright: ignore[reportUnknownMemberType]
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]

    def unmerge(self) -> None:
        if self.kept:
            self.base_layer, self.kept, self.merged_adapters = self.kept[0], [], ()
            self.port = port(self.base_layer)
            self.restack()

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        if x is None:  # blocks are called by keyword
            x = kwargs.pop(self.first)
        rows = None if self.disabled else self.call.get("")
        return self.through(self.stack_, x, *args, **kwargs) if rows is None else rows(self, x, *args, **kwargs)

    def through(self, stack: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = stack(x, *args, **kwargs)
        if not isinstance(stack, Adapted) or isinstance(self.port.op, OpaqueOp):
            return y
        want = x.dtype if x.is_floating_point() else self.port.dtype  # the one place where outputs are cast
        return y if y.dtype == want or torch.is_autocast_enabled(y.device.type) else y.to(want)

    def __getattr__(self, name: str) -> Any:
        """The frozen layer's attributes; under a published tensor name, `{adapter: module}` as `layer.lora_A["default"]`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules: dict[str, Any] = self.__dict__["_modules"]
        try:
            return getattr(modules["base_layer"], name)
        except AttributeError:
            found: dict[str, Any] = {}
            for key, adapter in modules["adapters"].items():
                try:
                    found[key] = adapter.find(name)
                except AttributeError:
                    continue
            if not found:
                raise AttributeError(f"neither the layer nor an adapter of it has {name!r}") from None
            return found

"""A frozen layer seen through its dense weight, and the registry of storage formats."""

# pyright: reportPrivateUsage=false
# (torch keeps the weights of a layer in `_parameters`, the one place where they can be exchanged in a copy)
from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trimtab.core.ops import Op, OpaqueOp
from trimtab.errors import NotMergeable, NotSupported


class Base:
    """A frozen layer. What it can do is read off what it overrides: `weight` (methods may look at it), `rebuild` (merge).

    Weights are always `(out, in, *kernel)`: embeddings and transformers' Conv1D show theirs transposed, so one equation
    serves all kinds of layers and `fan_in_fan_out` does not exist in here.
    """

    tolerance = 0.0  # largest |layer(x) - op(x, weight, bias)| / |y| beyond rounding; see the base's docstring
    parts: dict[str, Base] = {}  # of a layer with several weights: each by its parameter's name
    transposed = False  # the layer stores (in, out); published configs call it `fan_in_fan_out`

    def __init__(self, layer: nn.Module, op: Op, shape: tuple[int, ...]) -> None:
        self.layer, self.op, self.shape = layer, op, shape

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in; adapters are born in it."""
        return next((p.dtype for p in self.layer.parameters(recurse=False)), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.layer.parameters()), torch.device("cpu"))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(x, *args, **kwargs)

    def weight(self) -> Tensor:
        raise NotSupported(f"{type(self.layer).__name__} does not show a dense weight")

    def bias(self) -> Tensor | None:
        return getattr(self.layer, "bias", None)

    def rebuild(self, w: Tensor, b: Tensor | None) -> nn.Module:
        """A new layer of the same kind with weight `w` and bias `b`, each rounded once to what the layer stores."""
        raise NotMergeable(f"a weight cannot be written back into {type(self.layer).__name__}")

    def adapt(self, method: Any, cfg: Any, site: Any) -> Any:
        """The method's adapter for this layer; of a layer with several weights, one adapter for all of them."""
        return method(cfg, site)

    def pin(self) -> None:
        """Called for every layer of a model that gets an adapter: undo and forbid whatever would change it on its own."""


class Opaque(Base):
    """Any module: called and copied whole (`modules_to_save`). `reason`: why it is not more than that."""

    def __init__(self, layer: nn.Module, reason: str = "") -> None:
        super().__init__(layer, OpaqueOp(layer), ())
        self.reason = reason

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.layer.parameters() if p.is_floating_point()), torch.float32)


B = TypeVar("B", bound=Base)
_bases: dict[str, Callable[[Any], Base]] = {}


def base(*patterns: str) -> Callable[[type[B]], type[B]]:
    """Register a storage format for layers whose type, or a parent of it, has one of these qualified names (or globs)."""

    def register(cls: type[B]) -> type[B]:
        for pattern in patterns:
            _bases[pattern] = cls  # type: ignore[assignment] - formats take the layer alone
        return cls

    return register


@lru_cache(maxsize=1)
def bases() -> dict[str, Callable[[Any], Base]]:
    """Every registered format by pattern: one file each in `trimtab.bases`, found by looking there."""
    package = importlib.import_module("trimtab.bases")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"trimtab.bases.{module.name}")
    return _bases


@cache
def _format(kind: type) -> Callable[[Any], Base]:
    known = bases()
    for cls in kind.__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in known:
            return known[name]
        for pattern, make in known.items():
            if "*" in pattern and fnmatchcase(name, pattern):
                return make
    return Opaque


def port(layer: nn.Module) -> Base:
    """The frozen layer as a `Base`. A type of unknown format is `Opaque`, and so is a layer that its format refuses."""
    try:
        return _format(type(layer))(layer)
    except NotSupported as error:
        return Opaque(layer, str(error))


def rebuilt(layer: nn.Module, **params: Tensor | None) -> nn.Module:
    """A shallow copy of `layer` with these parameters instead: same settings and hooks, nothing of the old one changed."""
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    for name, value in params.items():
        new._parameters[name] = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
    return new

"""What a method is: its equation on the weight of one site, or a hook around a whole model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from trimtab.call import Call
from trimtab.core.base import Base
from trimtab.errors import NotSupported

if TYPE_CHECKING:
    from trimtab.core.config import PeftConfig
    from trimtab.core.group import Group

T = TypeVar("T")
Tensors = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Site:
    """Where one adapter goes: the frozen layer `base` at path `name` of the model."""

    name: str
    base: Base
    adapter: str = "default"
    shared: nn.Module | None = None
    call: Call = field(default_factory=Call)
    beside: nn.Module | None = None  # the adapters that stand there already, by name

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical `(out, in, *kernel)`; known without dequantising."""
        return self.base.shape

    @property
    def kind(self) -> str:
        return self.base.op.kind

    def need(self, method: str, *kinds: str) -> None:
        """Raise `NotSupported` unless the layer is of one of these kinds."""
        if self.kind not in kinds:
            layer = type(self.base.layer).__name__
            raise NotSupported(f"{method} does not fit {self.name!r} ({layer}): it takes {', '.join(kinds)} layers")

    def pick(self, patterns: dict[str, T] | None, default: T) -> T:
        """The value of the first pattern (`rank_pattern`, ...) that names this site; patterns match whole path ends."""
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.name):
                return value
        return default

    def generator(self, tensor: str) -> torch.Generator:
        """Randomness of its own for one tensor, from (seed, adapter, path, tensor): what ran before does not matter."""
        return seeded(f"{self.adapter}/{self.name}/{tensor}")


def seeded(key: str) -> torch.Generator:
    """A CPU generator that depends on `torch.manual_seed` and `key` alone."""
    digest = hashlib.blake2b(f"{torch.initial_seed()}/{key}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Factor(nn.Module):
    """A bare weight under the published name `<attribute>.weight`, with an optional `<attribute>.bias`."""

    def __init__(self, *shape: int, bias: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.zeros(bias)))

    def freeze(self) -> None:
        """The weight stays as it is: saved and merged, and nobody's to train."""
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class Adapter(nn.Module):
    """One method at one site. Override `weight` (and `bias`); override `forward` only to be faster.

    `weight` and `bias` are the definition: merging, stacking and every layer kind follow from them. `forward` may call
    `base` before, after or beside its own work and must equal the definition.
    """

    names: dict[str, str] = {}  # own state_dict prefix -> published prefix, where the two differ
    additive: bool = False  # W' - W does not depend on W, so the order in a stack does not matter
    routed: bool = False  # what it does depends on the input: `weight` and `bias` raise `NotMergeable`
    noisy: ClassVar[bool] = False  # training draws random numbers, or estimates gradients; in eval mode it is the definition
    on_modules: ClassVar[bool] = False  # it also acts around a module that is no layer: a block, an attention
    starts_at_base: bool = True  # W' = W before the first step
    as_filed: bool = False  # its tensors stand in the file as they are, though its class has a `pack`
    remembers: tuple[str, ...] = ()  # buffers that a training checkpoint holds beside what is trained
    targets: ClassVar[dict[str, list[str]] | None] = None  # default target_modules by model type, where not LoRA's
    among: ClassVar[bool] = False  # it mixes other adapters, which stand at its sites before it (`Site.beside`)
    uncached: ClassVar[bool] = False  # each forward reads the whole text
    takes: ClassVar[tuple[str, ...]] = ()  # arguments of forward and generate that are the method's: `task_ids`
    defaults: ClassVar[dict[str, dict[str, list[str]]]] = {}  # other fields that name targets, likewise

    def weight(self, w: Tensor) -> Tensor:
        return w

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        return b

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        w = base.weight()
        return base.op(x, self.weight(w), self.bias(base.bias(), w))

    def merged(self, site: Adapted) -> nn.Module:
        """The layer that does what base and adapter do together."""
        return site.base.rebuild(site.weight(), site.bias())

    @classmethod
    def share(cls, cfg: Any, sites: Sequence[Site]) -> nn.Module | None:
        """A module that all sites of one adapter use: each sets `self.shared = site.shared`. It is saved once, at the root."""
        return None

    @classmethod
    def aim(cls, model: nn.Module) -> list[str] | str | None:
        """The targets where none are given and the tables know none; None: all linear layers."""
        return None

    @classmethod
    def enter(cls, group: Group, call: Call, given: dict[str, Any]) -> Tensor | None:
        """Called when a forward of the model begins, with its arguments: what sites then read as `call.get(adapter)`, row by
        row. Arguments of the method's own (`takes`) are in `call.asked` and do not reach the model."""
        return None

    @classmethod
    def penalty(cls, group: Group) -> Tensor | None:
        """A term of the loss over the whole adapter."""
        return None

    @classmethod
    def step(cls, group: Group, step: int) -> None:
        """Called after each optimizer step, while its gradients are there."""

    @classmethod
    def pack(cls, group: Group, tensors: Tensors) -> Tensors:
        """What a file holds of an adapter's tensors, by (path, published name). `unpack`: back, before keys are checked."""
        return tensors

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        return tensors

    @classmethod
    def filed(cls, group: Group) -> PeftConfig:
        """The config that stands beside what `pack` gives."""
        return group.config

    def published(self, key: str) -> str:
        """The name in the file of this adapter's own tensor `key`."""
        for own, name in self.names.items():
            if key.startswith(own):
                return name + key[len(own) :]
        return key

    def find(self, attribute: str) -> Any:
        """What the published name `attribute` means here: `lora_A`, also where a DoRA holds it in its LoRA."""
        for own, name in [*self.names.items(), ("", "")]:
            if attribute.startswith(name):
                try:
                    return attrgetter((own + attribute[len(name) :]).strip("."))(self)
                except AttributeError:
                    continue
        raise AttributeError(attribute)


Fused = Callable[[Any, Any, Tensor], "Tensor | None"]  # (adapter, base, x) -> y, or None: not for this call
fused_forms: dict[tuple[type[Adapter], type[Base]], Fused] = {}
_fused_on = True


def fused(adapter: type[Adapter], *bases: type[Base]) -> Callable[[Fused], Fused]:
    """Register a faster form of `adapter.forward` over these bases. It holds for these very types: a subclass differs."""

    def register(form: Fused) -> Fused:
        fused_forms.update({(adapter, base): form for base in bases})
        return form

    return register


@contextmanager
def unfused() -> Generator[None]:
    """Within it every adapter answers by its own `forward`."""
    global _fused_on
    before, _fused_on = _fused_on, False
    try:
        yield
    finally:
        _fused_on = before


class Adapted(Base):
    """A base with one adapter on it is again a base, so a stack is a fold and forward and merge cannot disagree."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        super().__init__(base.layer, base.op, base.shape)
        self.base, self.adapter, self.tolerance = base, adapter, base.tolerance
        self.fused = fused_forms.get((type(adapter), type(base)))

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fused is not None and _fused_on and (y := self.fused(self.adapter, self.base, x)) is not None:
            return y
        return self.adapter(x, self.base, *args, **kwargs)

    def weight(self) -> Tensor:
        return self.adapter.weight(self.base.weight())

    def bias(self) -> Tensor | None:
        return self.adapter.bias(self.base.bias(), self.base.weight())

    def rebuild(self, w: Tensor, b: Tensor | None) -> nn.Module:
        return self.base.rebuild(w, b)


class ModelAdapter(nn.Module):
    """One method around a whole model: prompts and prefixes. Final classes live in `methods/prompt`."""

    names: dict[str, str] = {}
    takes: ClassVar[tuple[str, ...]] = ()
    own_loss: ClassVar[bool] = False  # the loss that the model returns is the method's

    def attach(self, model: nn.Module, group: Group) -> list[Any]:
        """Hook the model; returns the handles. A hook does nothing unless `group.live`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What the published file holds."""
        raise NotImplementedError

    def load(self, tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError

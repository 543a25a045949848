"""What an initialisation is, how it is found, and adapters whose factors start by one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Factor, Site, Tensors
from trimtab.core.config import PeftConfig, one_of, replaced
from trimtab.errors import BadCheckpoint, ConfigError, nearest

if TYPE_CHECKING:
    from trimtab.core.group import Group

I = TypeVar("I", bound="type[Init]")
_known: dict[str, type[Init]] = {}
_BOOLEANS = {True: "kaiming", False: "uniform"}


class Init:
    """How A (r, in, *kernel) and B (out, r) of one site start. Override `fill`.

    A file `inits/<name>.py` has one, under the decorator `@init`; `init_lora_weights="<name>"` asks for it, and
    `"<name>_<rest>"` gives it the `rest`. Options stand in the field `<name>_config`, whose class is `options`.
    """

    shifted: ClassVar[bool] = False  # the product that it starts with is taken off again: W' = W + s (B A - B0 A0)
    repeats: bool = False  # made again from the same weights it is the same, so that no file need hold it
    frozen: ClassVar[tuple[str, ...]] = ()  # of "lora_A" and "lora_B": what stays as it starts
    kinds: ClassVar[tuple[str, ...]] = ("linear",)  # layers that it fits
    options: ClassVar[type[Any] | None] = None
    needs: ClassVar[str] = ""  # the function that gathers what it needs to know of the user's data
    remedy: ClassVar[str] = (  # for a file without the start
        "where it was trained, save it with path_initial_model_for_weight_conversion, which writes a plain LoRA"
    )

    def __init__(self, cfg: Any, rest: str = "") -> None:
        """Raise `ConfigError` for what can be known to be wrong before there is a model."""
        if rest:
            raise ConfigError(f"init_lora_weights={cfg.init_lora_weights!r}: nothing goes behind the name")
        field = f"{type(self).__module__.rpartition('.')[2]}_config"
        self.cfg, self.given = cfg, getattr(cfg, field, None)

    def fits(self, site: Site, r: int) -> None:
        """Raise `NotSupported` or `ConfigError` where the layer's shape is not one that it fits."""
        site.need(f"init_lora_weights={self.cfg.init_lora_weights!r}", *self.kinds)

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        """Write into A and B, which are zeros in float32 on the CPU. The adapter adds s B A to the weight."""
        raise NotImplementedError

    def calibrate(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Gather what it `needs`, and may change the config, before the adapter is made on `model`."""


def init(cls: I) -> I:
    """Register an initialisation under the name of its file."""
    _known[cls.__module__.rpartition(".")[2]] = cls
    return cls


def inits() -> list[str]:
    """The names of all initialisations, sorted."""
    package = importlib.import_module("trimtab.inits")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def without_data() -> tuple[str, ...]:
    """The names of those that a model alone is enough for, true and false aside."""
    return tuple(n for n in inits() if n not in _BOOLEANS.values() and not _class(n).needs)


def init_of(cfg: Any) -> Init:
    """What `init_lora_weights` asks for: true, false, or a name with what may follow it."""
    value = cfg.init_lora_weights
    if isinstance(value, bool):
        name, rest = _BOOLEANS[value], ""
    else:
        named = [n for n in inits() if n not in _BOOLEANS.values()]
        fitting = [n for n in named if f"{value}_".lower().startswith(f"{n}_")]
        name = max(fitting, key=len) if fitting else one_of("init_lora_weights", value, [True, False, *named])
        rest = value[len(name) + 1 :]
    return _class(name)(cfg, rest)


def calibrate(model: nn.Module, cfg: Any, batches: Iterable[Any]) -> None:
    """Let the init that a config asks for, where it needs data, see these batches before the adapter is made."""
    if hasattr(cfg, "init_lora_weights") and (start := init_of(cfg)).needs:
        start.calibrate(model, batches)


def settle(cfg: Any) -> Init:
    """Options as the class that they are of. Raises for what the init refuses, and for one that goes with no variant."""
    for name in inits():
        if (given := getattr(cfg, field := f"{name}_config", None)) and isinstance(given, dict):
            setattr(cfg, field, _options(name, given))
    start = init_of(cfg)
    switched = [f.name for f in fields(cfg) if f.metadata.get("variant") and getattr(cfg, f.name)]
    if start.shifted and (odd := [n for n in switched if n != "use_dora"]):
        raise ConfigError(f"init_lora_weights={cfg.init_lora_weights!r} and {odd[0]} do not go together")
    return start


def _class(name: str) -> type[Init]:
    importlib.import_module(f"trimtab.inits.{name}")
    return _known[name]


def _options(name: str, given: dict[str, Any]) -> Any:
    made = _class(name).options
    assert made is not None
    names = [f.name for f in fields(made)]
    if unknown := sorted(given.keys() - set(names)):
        raise ConfigError(f"{name}_config has no {unknown[0]!r}.{nearest(unknown[0], names)} It has: {', '.join(names)}")
    return made(**given)


class Started(Adapter):
    """A low-rank adapter that starts by an `Init`; it has `lora_A`, `lora_B` and `s`.

    Where the init is `shifted`, the start is a matter of the adapter, W' = W + s (B A - B0 A0), and the layer below stays as
    it is: so it works on quantised layers, and what is saved fits the model as published. The file holds a plain LoRA of
    rank 2r.
    """

    lora_A: Factor
    lora_B: Factor
    s: float
    start_A: Tensor | None  # (r, in), where shifted
    start_B: Tensor | None  # (out, r)

    def begin(self, cfg: Any, site: Site) -> None:
        start, A, B = init_of(cfg), self.lora_A.weight, self.lora_B.weight
        start.fits(site, A.shape[0])
        if site.base.device.type != "meta":  # a model that is a shape without weights: `trimtab sites`
            with torch.no_grad():
                start.fill(A, B, site, self.s)
        self.register_buffer("start_A", A.detach().clone() if start.shifted else None)
        self.register_buffer("start_B", B.detach().clone() if start.shifted else None)
        self.remembers, self.as_filed = ("start_A", "start_B") if start.shifted else (), not start.shifted
        for name in start.frozen:
            getattr(self, name).freeze()

    def factors(self) -> tuple[Tensor, Tensor]:
        """What is multiplied: A and B, or, where a start is taken off, factors of rank 2r of the same difference."""
        A, B = self.lora_A.weight, self.lora_B.weight.flatten(1)
        return (A, B) if self.start_A is None or self.start_B is None else _difference(A, B, self.start_A, self.start_B)

    @classmethod
    def pack(cls, group: Group, tensors: Tensors) -> Tensors:
        for path in _shifted(group):
            A, B, A0, B0 = (tensors.pop((path, name)) for name in _NAMES)
            tensors[path, _NAMES[0]], tensors[path, _NAMES[1]] = _difference(A, B, A0, B0)
        return tensors

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        start = init_of(group.config)
        for path, part in _shifted(group).items():
            A, B, r = tensors.get((path, _NAMES[0])), tensors.get((path, _NAMES[1])), part.lora_A.weight.shape[0]
            if A is None or B is None:
                continue
            if len(A) == 2 * r == B.shape[1]:  # whatever the two halves are, these say the same
                A0, B0 = A[r:], B[:, :r] - B[:, r:]
                A, B = A[:r] + A0, B[:, :r]
            elif start.repeats:
                A0, B0 = part.start_A, part.start_B
            else:
                cfg: Any = group.config
                raise BadCheckpoint(
                    f"adapter {group.name!r} was started by {cfg.init_lora_weights!r} on weights that were changed for it, and "
                    f"the file does not say how: on the model as published it is another adapter. Fix: {start.remedy}"
                )
            tensors |= dict(zip(((path, name) for name in _NAMES), (A, B, A0, B0), strict=True))  # type: ignore[arg-type]
        return tensors

    @classmethod
    def filed(cls, group: Group) -> PeftConfig:
        """Of a plain LoRA, twice the rank at the same s, where a start was taken off."""
        cfg: Any = group.config
        if not _shifted(group):
            return cfg
        alpha = 2**0.5 if cfg.use_rslora else 2
        own = {f.name: f.default_factory() if callable(f.default_factory) else f.default
               for f in fields(cfg) if f.name.removesuffix("_config") in inits()}  # fmt: skip
        return replaced(
            cfg,
            init_lora_weights=True,
            r=2 * cfg.r,
            lora_alpha=alpha * cfg.lora_alpha,
            rank_pattern={k: 2 * v for k, v in cfg.rank_pattern.items()},
            alpha_pattern={k: alpha * v for k, v in cfg.alpha_pattern.items()},
            **own,
        )


_NAMES = ("lora_A.weight", "lora_B.weight", "start_A", "start_B")


def _shifted(group: Group) -> dict[str, Started]:
    return {path: part for path, part in group.each(Started) if part.start_A is not None}


def _difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A - B0 A0 = B (A - A0) + (B - B0) A0. At the start they are exactly 0, and later they keep the digits
    that [B, -B0] [A; A0] would lose in 16 bits, where two large products cancel."""
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)

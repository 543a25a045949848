"""Adapter configs, read and written as published `adapter_config.json` files, and the registry of methods."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, cast

from trimtab.errors import BadCheckpoint, ConfigError, NotSupported, TrimtabWarning, nearest
from trimtab.files import read_json, write_text
from trimtab.typed import check

FORMAT = "0.21.2"  # the version of the published file format that is written
CONFIG_FILE = "adapter_config.json"


class TaskType(str, Enum):
    """What the model is for. It decides which freshly made head is trained and saved with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def option(default: Any, help: str, **more: Any) -> Any:
    """A config field with the line that `--help`, the docs and the page show. `variant`: the method file it switches to;
    `choices`: values that the contract tries, beside true and false; `holds`: where the class stands whose options it is;
    `place`: a file of `methods` with hooks, see `places`."""
    make: Any = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata={"help": help, **more})


@dataclass(kw_only=True)
class PeftConfig:
    """What every adapter config has. Fields are spelled as in published `adapter_config.json` files."""

    peft_type: ClassVar[str] = ""
    task_type: str | None = option(None, "what the model is for: CAUSAL_LM, SEQ_CLS, ...")
    auto_mapping: dict[str, Any] | None = option(None, "class of the base model, where there is no task type")
    peft_version: str | None = option(FORMAT, "version of the file format")
    base_model_name_or_path: str | None = option(None, "the base model that the adapter belongs to")
    revision: str | None = option(None, "revision of the base model")
    inference_mode: bool = option(False, "true: the adapter is created frozen")

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self.task_type = one_of(
                "task_type", getattr(self.task_type, "value", self.task_type), [t.value for t in TaskType]
            )
        for f in fields(self):
            value = getattr(self, f.name)
            if "holds" in f.metadata and value is not None and value is not False:
                setattr(self, f.name, _held(f.name, value, f.metadata["holds"]))

    def places(self, model: Any) -> list[str] | str | None:
        """The targets, where the config names them in a way of its own; none: `target_modules`, or the tables."""
        return None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        sets: dict[str, set[str]] = {k: v for k, v in values.items() if isinstance(v, set)}
        nested = {k: dataclasses.asdict(cast(Any, v)) for k, v in values.items() if dataclasses.is_dataclass(v)}
        return {"peft_type": self.peft_type} | values | nested | {k: sorted(v) for k, v in sets.items()}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json`: keys sorted, `inference_mode` true, so that loading gives a frozen adapter."""
        text = json.dumps(self.to_dict() | {"inference_mode": True}, indent=2, sort_keys=True)
        write_text(Path(save_directory) / CONFIG_FILE, text + "\n")

    @staticmethod
    def from_dict(values: dict[str, Any], where: str = CONFIG_FILE) -> PeftConfig:
        """The config a published file describes. Unknown keys: null and default-like values are ignored with one line,
        real ones raise."""
        kind = values.get("peft_type")
        if not isinstance(kind, str):
            raise BadCheckpoint(f"{where}: `peft_type` is {kind!r}; it names the method, as in 'LORA'")
        cls = load(kind).config
        names = {f.name for f in fields(cls)}
        unknown = {k: v for k, v in values.items() if k not in names and k != "peft_type"}
        if real := sorted(k for k, v in unknown.items() if not default_like(v)):
            shown = ", ".join(f"{k}={unknown[k]!r}" for k in real)
            raise ConfigError(
                f"{where}: {cls.__name__} has no {shown}.{nearest(real[0], names)} Ignoring it would load a different adapter."
            )
        if unknown:
            warnings.warn(f"{where}: ignored without effect: {', '.join(sorted(unknown))}", TrimtabWarning)
        known = {k: v for k, v in values.items() if k in names}
        check(cls, known, where)
        return cls(**known)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the config of an adapter folder. `kwargs` override fields that the file leaves null."""
        path = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_FILE)
        if not path.is_file():
            raise BadCheckpoint(f"no {CONFIG_FILE} in {path.parent}: is this an adapter folder?")
        values = read_json(path)
        known = {k: v for k, v in kwargs.items() if values.get(k) is None}
        config = cls.from_dict(values | known, str(path))
        if not isinstance(config, cls):
            raise ConfigError(f"{path}: holds a {type(config).__name__}, not a {cls.__name__}")
        return config


def _held(name: str, value: Any, place: str) -> Any:
    """The options that a field holds: an object of the class at `place`, from a dict, or from true: all as they are."""
    module, _, kind = place.rpartition(".")
    cls: Any = getattr(importlib.import_module(f"trimtab.{module}"), kind)
    given: Any = {} if value is True else value
    if not isinstance(given, (dict, cls)):
        raise ConfigError(f"{name}={value!r}: it is a {kind}, or a mapping of its options")
    names = [f.name for f in fields(cls)]
    if unknown := [k for k in cast("dict[str, Any]", given) if k not in names] if isinstance(given, dict) else []:
        raise ConfigError(f"{name} has no option {unknown[0]!r}.{nearest(unknown[0], names)} It has: {', '.join(names)}")
    return cls(**given) if isinstance(given, dict) else given


def default_like(value: Any) -> bool:
    """Null, false, empty, or a dict of such: a key from another version with such a value says nothing."""
    if isinstance(value, dict):
        return all(map(default_like, cast("dict[Any, Any]", value).values()))
    return not value


def one_of(name: str, value: Any, allowed: list[Any]) -> Any:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r}: it is one of {', '.join(map(repr, allowed))}.{nearest(str(value), map(str, allowed))}"
        )
    return value


def in_range(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        bounds = f"must be at least {low}" if high == float("inf") else f"lies between {low} and {high}"
        raise ConfigError(f"{name}={value!r}: it {bounds}")


@dataclass(kw_only=True)
class Targets(PeftConfig):
    """The fields that say where a method goes."""

    target_modules: list[str] | str | None = option(
        None, "names of layers, a regex, or `all-linear`; none: by model type"
    )
    modules_to_save: list[str] | None = option(None, "modules that are trained in full beside the adapter")


@dataclass(kw_only=True)
class Excludes(PeftConfig):
    exclude_modules: list[str] | str | None = option(None, "names or a regex of layers left alone")


@dataclass(kw_only=True)
class Layers(PeftConfig):
    layers_to_transform: list[int] | int | None = option(None, "only these layer numbers")
    layers_pattern: list[str] | str | None = option(None, "name of the list of layers, where it is not found")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"layers_pattern={self.layers_pattern!r} says where layers_to_transform counts: give both")


@dataclass(kw_only=True)
class Biases(PeftConfig):
    bias: str = option("none", "biases trained in place: none, all, or <method>_only: those of the adapted layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            one_of("bias", self.bias, ["none", "all", f"{self.peft_type.lower()}_only"])


@dataclass(kw_only=True)
class FanIn(PeftConfig):
    fan_in_fan_out: bool = option(False, "kept for the file format; a layer's orientation is read off the layer")


@dataclass(frozen=True)
class Method:
    """A registered method: `lora`, or a variant of one such as `dora`, which a field of the config switches on."""

    name: str
    adapter: type[Any]
    config: type[PeftConfig]
    small: dict[str, Any] = field(default_factory=dict[str, Any])  # fields that make it fit tiny test layers
    switch: str | None = None  # the field that switches the variant on


_methods: dict[str, Method] = {}


def method(
    peft_type: str, *, config: type[PeftConfig], small: dict[str, Any] | None = None, switch: str | None = None
) -> Callable[[type], type]:
    """Register a method under its published `peft_type`. Its file is `methods/<peft_type>.py` in lower case, or, for a
    variant that the config field `switch` turns on, the file which that field's `variant=` names."""

    def register(cls: type) -> type:
        name = cls.__module__.rpartition(".")[2] if switch else peft_type.lower()
        if name in _methods and _methods[name].adapter.__module__ != cls.__module__:
            raise ConfigError(
                f"two methods are called {name!r}: {_methods[name].adapter.__module__} and {cls.__module__}"
            )
        _methods[name] = Method(name, cls, config, small or {}, switch)
        if not switch:
            config.peft_type = peft_type
        return cls

    return register


def load(name: str) -> Method:
    """The method of this name or `peft_type`. Its file is found by its name: there is no list to edit."""
    key = name.lower()
    if key not in _methods and key.isidentifier():
        for package in ("trimtab.methods", "trimtab.methods.prompt"):
            if importlib.util.find_spec(f"{package}.{key}") is not None:
                importlib.import_module(f"{package}.{key}")
        for entry in importlib.metadata.entry_points(group="trimtab.methods", name=key):
            entry.load()
    if key not in _methods:
        raise ConfigError(f"no method is called {name!r}.{nearest(key, methods())} All of them: trimtab methods")
    return _methods[key]


def modules(*packages: str) -> list[str]:
    """The modules of all methods, or of these packages."""
    places = [(p, importlib.import_module(p).__path__) for p in packages or ("trimtab.methods", "trimtab.methods.prompt")]
    found = [(package, module) for package, path in places for module in pkgutil.iter_modules(path)]
    return [f"{package}.{m.name}" for package, m in found if not m.ispkg and not m.name.startswith("_")]


def methods() -> list[str]:
    """The names of all methods, sorted."""
    for module in modules():
        importlib.import_module(module)
    return sorted(_methods)


def method_of(cfg: PeftConfig) -> Method:
    """The method that a config asks for: the variant whose switch is on, else the plain one."""
    switched = [f for f in fields(cfg) if f.metadata.get("variant") and not default_like(getattr(cfg, f.name))]
    if len(switched) > 1:
        raise NotSupported(f"{' and '.join(f.name for f in switched)} cannot be combined")
    if not switched:
        return load(cfg.peft_type)
    name = switched[0].metadata["variant"]
    if importlib.util.find_spec(f"trimtab.methods.{name}") is None:
        raise NotSupported(f"{switched[0].name}={getattr(cfg, switched[0].name)!r} is not supported by this version")
    return load(name)


def places(cfg: PeftConfig, hook: str) -> list[Any]:
    """The functions called `hook` in the files that the fields which are set name as `place`: `prepare` changes the model's
    shape, `sites` finds more sites than the targets, `extend` puts more adapters into the plan."""
    found = [f.metadata["place"] for f in fields(cfg) if "place" in f.metadata and not default_like(getattr(cfg, f.name))]
    files = [importlib.import_module(f"trimtab.methods.{name}") for name in dict.fromkeys(found)]
    return [getattr(file, hook) for file in files if hasattr(file, hook)]


def config_class(name: str) -> type[PeftConfig]:
    return load(name).config


def config_for(name: str, **values: Any) -> PeftConfig:
    """A method's config from its name and published fields; an unknown field raises with the nearest one."""
    chosen = load(name)
    names = [f.name for f in fields(chosen.config)]
    if unknown := [k for k in values if k not in names]:
        raise ConfigError(
            f"{name} has no option {', '.join(map(repr, unknown))}.{nearest(unknown[0], names)}"
            f" Its options: trimtab methods {name}"
        )
    switched: dict[str, Any] = {chosen.switch: True} if chosen.switch else {}
    return chosen.config(**switched | values)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict in the published form describes."""
    return PeftConfig.from_dict(config_dict, "config")


def replaced(cfg: PeftConfig, **values: Any) -> PeftConfig:
    return dataclasses.replace(cfg, **values)

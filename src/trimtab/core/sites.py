"""Which layers of a model a config names. Nothing is matched silently, and nothing that was asked for is silently not."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from trimtab.core.adapter import Site
from trimtab.core.base import Opaque, port
from trimtab.core.config import method_of, places
from trimtab.core.layer import AdapterLayer
from trimtab.errors import ConfigError, NoMatch, NotSupported, TrimtabWarning, nearest
from trimtab.targets import HEADS, TARGETS

ALL_LINEAR = "all-linear"


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model under its original path, adapted ones as themselves, nothing of the adapters."""
    return _walk(model, "", set())


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child, inner in frozen(module).named_children():
        if name or child != "prompt_encoder":
            yield from _walk(inner, f"{name}.{child}" if name else child, seen)


def at(model: nn.Module, path: str) -> nn.Module:
    """The module at its original path. Raises `AttributeError`."""
    for part in path.split(".") if path else ():
        model = getattr(frozen(model), part)
    return model


def frozen(module: nn.Module) -> nn.Module:
    """The layer as it was before adapters."""
    if isinstance(module, AdapterLayer):
        return module.kept[0] if module.kept else module.base_layer
    return module


def ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def matches(name: str, pattern: list[str] | str) -> bool:
    """A string is a regex for the whole path; a list holds path ends."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(ends_with(name, p) for p in pattern)


def saved_modules(model: nn.Module, cfg: Any, *, fresh: bool) -> list[str]:
    """`modules_to_save` and the head that the task makes afresh: by its usual names, and, for a fresh adapter, whatever
    stands beside the model's body. A published file names what it holds."""
    usual = HEADS.get(cfg.task_type or "", [])
    body, beside = getattr(model, "base_model", None), []
    if fresh and usual and isinstance(body, nn.Module) and body is not model:
        own = (child for child in model.named_children() if child[0] != "prompt_encoder" and child[1] is not body)
        beside = [name for name, child in own if any(True for _ in child.parameters())]
    return list(dict.fromkeys([*(getattr(cfg, "modules_to_save", None) or []), *usual, *beside]))


def find_saved(model: nn.Module, names: list[str], cfg: Any) -> dict[str, nn.Module]:
    """The modules to train in full, by path, outermost only. One that is asked for and not there raises; of the usual
    names of heads any may be missing."""
    found: dict[str, nn.Module] = {}
    for name, module in layers(model):
        inside = any(name.startswith(f"{f}.") for f in found)
        if name and not inside and any(ends_with(name, m) for m in names):
            found[name] = module
    usual = HEADS.get(cfg.task_type or "", [])
    if missing := [m for m in names if m not in usual and not any(ends_with(n, m) for n in found)]:
        leaves = {n.rpartition(".")[2] for n, _ in layers(model)}
        raise NoMatch(f"modules_to_save names no module: {', '.join(map(repr, missing))}.{nearest(missing[0], leaves)}")
    return found


def find_sites(
    model: nn.Module, cfg: Any, saved: dict[str, nn.Module], adapter: str = "default", *, strict: bool = True
) -> list[Site]:
    """The layers that get an adapter, in model order; none in the modules that are `saved` whole.

    strict: each name in `target_modules` must match; off when a published config is loaded, where the tensors decide.
    Raises `NoMatch` with the nearest name, and `NotSupported` for a layer that cannot carry the method.
    """
    target = _targets(model, cfg)
    head = _output_embedding(model) if target == ALL_LINEAR else None
    heads = _mha_projections(model)
    found: list[Site] = []
    for name, module in layers(model):
        if not name or any(name == s or name.startswith(f"{s}.") for s in saved):
            continue
        base = port(frozen(module))
        linear = base.op.kind == "linear" or isinstance(frozen(module), nn.Linear)  # of unknown format: refused below
        hit = linear and frozen(module) is not head if target == ALL_LINEAR else matches(name, target)
        if not hit or not _in_layers(name, cfg, target) or _excluded(name, cfg):
            continue
        if name in heads:
            if target != ALL_LINEAR:
                raise NotSupported(
                    f"{name!r}: nn.MultiheadAttention reads this weight past the layer, so an adapter would do nothing"
                )
            continue
        found.append(Site(name, base, adapter, beside=module.adapters if isinstance(module, AdapterLayer) else None))
    for more in places(cfg, "sites"):
        found += more(cfg, model, adapter, found)
    _check(model, cfg, target, found, strict)
    if strict and not getattr(cfg, "target_parameters", None):  # who names some knows of the others
        _tell_experts(model, target, {s.name for s in found})
    _complete(model, cfg, target, found)
    return found


def _tell_experts(model: nn.Module, target: list[str] | str, found: set[str]) -> None:
    """The weights of experts in one slab are no layers: a target that names all layers, or their neighbours, passes them by."""
    left: dict[str, int] = Counter()
    for name, module in layers(model):
        block = name.rpartition(".")[0]
        if name in found or not (target == ALL_LINEAR or any(n.startswith(f"{block}.") for n in found)):
            continue
        if port(frozen(module)).op.kind == "module":
            own = frozen(module).named_parameters(recurse=False)
            left.update(f"{name.rpartition('.')[2]}.{n}" for n, p in own if p.dim() == 3 and len(p) > 1)
    if left:
        names = ", ".join(f"{n} ({count})" for n, count in left.items())
        warnings.warn(
            f"frozen though its neighbours are adapted: {names}, where experts are one tensor and no layers. To adapt them: "
            f"target_parameters={[*left]}", TrimtabWarning
        )  # fmt: skip


def _complete(model: nn.Module, cfg: Any, target: list[str] | str, found: list[Site]) -> None:
    """Write into the config what the model decided, so that its file says it and no reader needs the tables."""
    if cfg.target_modules is None and target:
        cfg.target_modules = target
    defaults: dict[str, dict[str, list[str]]] = getattr(method_of(cfg).adapter, "defaults", {})
    for field, table in defaults.items():
        if getattr(cfg, field) is None:
            names = table.get(_model_type(model), [])
            chosen = [t for t in target if any(ends_with(t, n) for n in names)] if isinstance(target, list) else names
            setattr(cfg, field, chosen)
    if hasattr(cfg, "fan_in_fan_out"):
        cfg.fan_in_fan_out = any(s.kind == "linear" and s.base.transposed for s in found)


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def _targets(model: nn.Module, cfg: Any) -> list[str] | str:
    places = cfg.places(model)
    target = cfg.target_modules if places is None else places
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if target is not None:
        if not isinstance(target, str):
            return list(target)
        try:
            re.compile(target)
        except re.error as error:
            raise ConfigError(
                f"target_modules={target!r} is a string, so it is a regex for the whole path, and not a right one: {error}"
            ) from None
        return target
    kind, adapter = _model_type(model), method_of(cfg).adapter
    table: dict[str, list[str]] = TARGETS if adapter.targets is None else adapter.targets
    if kind in table:
        return list(table[kind])
    if (aimed := adapter.aim(model)) is not None:
        return aimed
    if getattr(cfg, "target_parameters", None):
        return []
    warnings.warn(
        f"no target_modules given and none known for model type {kind!r}: all linear layers are adapted", TrimtabWarning
    )
    return ALL_LINEAR


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return frozen(head) if isinstance(head, nn.Module) else None


def _mha_projections(model: nn.Module) -> set[str]:
    return {f"{name}.out_proj" for name, module in layers(model) if isinstance(module, nn.MultiheadAttention)}


def _in_layers(name: str, cfg: Any, target: list[str] | str) -> bool:
    wanted = getattr(cfg, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    if isinstance(target, str) and target != ALL_LINEAR:
        raise ConfigError("layers_to_transform goes with a list of target_modules; a regex names its layers itself")
    patterns = getattr(cfg, "layers_pattern", None) or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name):
            return int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _excluded(name: str, cfg: Any) -> bool:
    exclude = getattr(cfg, "exclude_modules", None)
    return bool(exclude) and matches(name, exclude)


def _limits_match(model: nn.Module, cfg: Any, target: list[str] | str, found: list[Site]) -> None:
    """Each number of `layers_to_transform` is that of an adapted layer, each name of `exclude_modules` one of a module."""
    numbers: Any = getattr(cfg, "layers_to_transform", None)
    exclude: Any = getattr(cfg, "exclude_modules", None) or ""
    for number in () if numbers is None or isinstance(numbers, int) else numbers:
        one = copy.copy(cfg)
        one.layers_to_transform = [number]
        if not any(_in_layers(s.name, one, target) for s in found):
            raise NoMatch(f"layers_to_transform: {number} is the number of none of the {len(found)} adapted layers")
    for name in () if isinstance(exclude, str) else exclude:
        if not any(matches(module, [name]) for module, _ in layers(model)):
            leaves = {module.rpartition(".")[2] for module, _ in layers(model)}
            raise NoMatch(f"exclude_modules: {name!r} matches no module.{nearest(name, leaves)}")


def _check(model: nn.Module, cfg: Any, target: list[str] | str, found: list[Site], strict: bool) -> None:
    wanted = target if isinstance(target, list) else [target]
    missing = [t for t in wanted if not any(matches(s.name, [t] if isinstance(target, list) else t) for s in found)]
    if target == ALL_LINEAR:
        missing = [] if found else wanted
    if not found or (missing and strict and cfg.target_modules is not None):
        missing = missing or wanted or [""]
        leaves = Counter(
            n.rpartition(".")[2] for n, m in layers(model) if port(frozen(m)).op.kind not in ("module", "norm")
        )
        names = ", ".join(f"{leaf} ({count})" for leaf, count in leaves.most_common(12))
        limits = ", ".join(
            f"{k}={v!r}" for k in ("layers_to_transform", "layers_pattern", "exclude_modules") if (v := getattr(cfg, k, None))
        )
        raise NoMatch(
            f"no module matches target {', '.join(map(repr, missing))}{f' with {limits}' if limits else ''}."
            f"{nearest(missing[0], leaves)} The model has: {names}. See: trimtab sites MODEL"
        )
    if strict:
        _limits_match(model, cfg, target, found)
    fields, names = cfg.to_dict(), [n for s in found for n in (s.name, *(f"{s.name}.{part}" for part in s.base.parts))]
    for field in (f for f, value in fields.items() if f.endswith("_pattern") and isinstance(value, dict)):
        patterns: dict[str, Any] = fields[field]
        for pattern in patterns:
            if strict and not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise NoMatch(
                    f"{field}: {pattern!r} matches none of the {len(found)} adapted layers, such as {found[0].name!r}"
                )
    if odd := [s for s in found if isinstance(s.base, Opaque) and not method_of(cfg).adapter.on_modules]:
        kinds = ", ".join(sorted({type(s.base.layer).__name__ for s in odd}))
        reason = next((s.base.reason for s in odd if isinstance(s.base, Opaque)), "") or "no layer that an adapter could act on"
        more = f" and {len(odd) - 1} more targets are" if len(odd) > 1 else " is"
        raise NotSupported(f"{odd[0].name!r}{more} {kinds}: {reason}")

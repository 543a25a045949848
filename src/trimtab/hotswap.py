"""Adapters of a model in use: other weights in the same place, without compiling again; more or less of what they do."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import store
from trimtab.bases._parts import Parts, Slab
from trimtab.blend import spread
from trimtab.core import group as groups
from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base, port
from trimtab.core.config import PeftConfig, method_of, one_of, replaced
from trimtab.core.full import FullTune
from trimtab.core.group import Group
from trimtab.core.sites import frozen
from trimtab.errors import BadCheckpoint, ConfigError, NoMatch, NotMergeable, NotSupported, TrimtabWarning
from trimtab.methods.lora import LoRA, LoraConfig
from trimtab.mixed import Answered
from trimtab.verbs import Verbs

# fields that do not change what given tensors do: where they came from, how they started, where they go
FREE = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "init_weights",
}  # fmt: skip
SCALES = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}  # LoRA's: swapped with the tensors


def _bare(model: Any) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, Verbs) else model


# -- hot swap ---------------------------------------------------------------------------------------------------------
def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | Path, adapter_name: str, torch_device: Any = None, **kwargs: Any
) -> None:
    """Put the adapter of a folder in the place of one on the model, of the same method, under the same name.

    Tensors are copied into those that are there, so a compiled model goes on as it is; where LoRA's ranks or scales differ,
    that takes `prepare_model_for_compiled_hotswap` before compiling. Layers that the new LoRA leaves out do nothing
    afterwards. Raises, and changes nothing, where it does not fit.
    """
    path = store.folder(model_name_or_path, kwargs.get("subfolder"))
    hotswap_adapter_from_state_dict(model, store.read(path), adapter_name, PeftConfig.from_pretrained(path))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from published tensors and their config. `parameter_prefix` changes nothing."""
    base = _bare(model)
    group = groups.group(base, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in group.layers.values()):
        raise NotMergeable(f"adapter {adapter_name!r} is merged into the weights: unmerge_adapter() first")
    old, new = group.config.to_dict(), config.to_dict()
    plain = _loras(group)
    free = FREE | (SCALES if plain else set())
    if odd := sorted(k for k in old.keys() | new.keys() if k not in free and old.get(k) != new.get(k)):
        shown = "; ".join(f"{k} {old.get(k)!r} here, {new.get(k)!r} there" for k in odd)
        raise ConfigError(f"another adapter cannot take the place of {adapter_name!r}: {shown}")
    given = {k if k.startswith(store.ROOT) else f"{store.PREFIX}{k}": v for k, v in state_dict.items()}
    scales = [_fit(group, place, config, given) for place in plain]
    own = store.live(group)
    if missing := [k for k in own if k not in given]:  # layers that only the old one had
        whole = all(isinstance(a, LoRA) for _, a in group.sites())
        if not whole or any(f"{store.PREFIX}{path}." in k for k in given for path in _paths(missing)):
            raise BadCheckpoint(f"the other adapter has no {missing[0]}: nothing was swapped")
        given |= {k: torch.zeros_like(own[k]) for k in missing}
    store.load(base, group, given)
    for place, scale in zip(plain, scales, strict=True):
        _set_scale(place.lora, scale)
    group.config = _described(group, config) if plain else config


def _paths(keys: list[str]) -> set[str]:
    return {k.removeprefix(store.PREFIX).rpartition(".lora_")[0] for k in keys}


@dataclass(frozen=True)
class Place:
    """A LoRA of an adapter: the layer's path, the name that patterns know it by, where the file holds it, and whether the
    factors of how many experts lie in one tensor (0: of none)."""

    path: str
    name: str
    prefix: str
    lora: LoRA
    experts: int = 0

    @property
    def rank(self) -> int:
        return self.lora.lora_A.weight.shape[0] // max(1, self.experts)

    def padded(self, t: Tensor, dim: int, rank: int) -> Tensor:
        """A (`dim` 0) or B (1) with zeros up to this rank: A has the rows of a group, or of an expert, one after another, and
        B its experts' columns rank by rank."""
        parts, copies = self.lora.op.groups, max(1, self.experts)
        return _padded(t, dim, rank * copies, parts * copies if dim == 0 else parts)


def _places(path: str, adapter: nn.Module) -> Iterator[Place]:
    if not isinstance(adapter, Parts):
        yield from (Place(path, path, "", m) for m in adapter.modules() if isinstance(m, LoRA))
        return
    for name, part, own in zip(adapter.paths, adapter.of, adapter.parts, strict=True):
        experts = own.experts if isinstance(own, Slab) else 0
        yield from (Place(path, name, part.prefix, m, experts) for m in own.modules() if isinstance(m, LoRA))


def _loras(group: Group) -> list[Place]:
    found = [place for path, adapter in group.sites() for place in _places(path, adapter)]
    if started := [place.path for place in found if place.lora.start_A is not None]:
        raise NotSupported(
            f"adapter {group.name!r} started by an init that is taken off on {started[0]!r}: save it, which writes a plain "
            "LoRA, and load that"
        )
    return found


def _fit(group: Group, place: Place, config: Any, given: dict[str, Tensor]) -> float:
    """The scale of the new LoRA on a layer. Its tensors in `given` become as large as those that are there."""
    rank, scale = LoRA.scale(config, Site(place.name, port(frozen(group.layers[place.path]))))
    stem = f"{store.PREFIX}{place.path}.{place.prefix}lora_"
    for name, dim in (("A", 0), ("B", 1)):
        for key in (f"{stem}{name}.weight", f"{stem}embedding_{name}"):
            if key not in given:
                continue
            if rank > place.rank:
                raise ConfigError(
                    f"{place.name!r} has room for rank {place.rank}, and the other adapter has {rank} there. Before the "
                    f"model is compiled: prepare_model_for_compiled_hotswap(model, target_rank={rank})"
                )
            given[key] = place.padded(given[key], dim, place.rank)
    return scale


def _padded(t: Tensor, dim: int, rank: int, parts: int) -> Tensor:
    """A (r, ...) or B (out, r / parts, ...) with zeros up to this rank. Of a convolution with groups each group has its own
    r / parts rows of A, one after another."""
    if dim == 0 and parts > 1:
        return _padded(t.unflatten(0, (parts, -1)), 1, rank, parts).flatten(0, 1)
    lack = rank // parts - t.shape[dim]
    return torch.cat([t, t.new_zeros(*t.shape[:dim], lack, *t.shape[dim + 1 :])], dim) if lack else t


def _set_scale(lora: LoRA, scale: float) -> None:
    if isinstance(lora.s, Tensor):
        lora.s.fill_(scale)
    else:
        lora.s = scale


def _described(group: Group, config: Any) -> PeftConfig:
    """The config that says what the tensors are now: their ranks with the zeros, and the alpha that gives each its scale."""
    found = {p.name: (p.rank, float(torch.as_tensor(p.lora.s).flatten()[0])) for p in _loras(group)}
    r, ranks = spread({path: r for path, (r, _) in found.items()})
    root = 0.5 if config.use_rslora else 1
    alpha, alphas = spread({path: s * n**root for path, (n, s) in found.items()})
    return replaced(config, r=r, rank_pattern=ranks, lora_alpha=alpha, alpha_pattern=alphas,
                    target_modules=group.config.target_modules)  # type: ignore[attr-defined] # fmt: skip


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Before a model is compiled: give its LoRAs `target_rank`, with zeros, and keep their scales in tensors, so that others
    of any rank up to it and any alpha can be swapped in. `config`: configs that are to say `target_rank` too."""
    one_of("check_compiled", check_compiled, ["error", "warn", "ignore"])
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        text = "prepare_model_for_compiled_hotswap comes before torch.compile: a compiled model would be compiled again"
        if check_compiled == "error":
            raise ConfigError(text)
        if check_compiled == "warn":
            warnings.warn(text, TrimtabWarning)
    known = groups.groups(_bare(model)).values()
    found = [(group, place) for group in known for place in _loras(group)]
    if not found:
        raise NoMatch("the model carries no LoRA: load the first one, then prepare, then compile")
    if target_rank is not None:
        _pad([place for _, place in found], target_rank)
    for _, place in found:
        if not isinstance((lora := place.lora).s, Tensor):
            scale = lora.lora_A.weight.new_full([place.experts] * (place.experts > 0), float(lora.s))
            del lora.s
            lora.register_buffer("s", scale, persistent=False)
    for group in {id(g): g for g, _ in found}.values():
        group.config = _described(group, group.config)
    if config is not None and target_rank is not None:
        for cfg in config.values() if isinstance(config, dict) else [config]:
            cfg.r, cfg.rank_pattern = target_rank, dict.fromkeys(cfg.rank_pattern, target_rank)


def _pad(found: list[Place], rank: int) -> None:
    for place in found:
        parts = place.lora.op.groups
        if rank < place.rank or rank % parts:
            why = f"its {parts} groups do not divide it" if rank % parts else f"it has rank {place.rank}"
            raise ConfigError(f"target_rank={rank} does not go on {place.name!r}: {why}")
    for place in found:
        for factor, dim in ((place.lora.lora_A, 0), (place.lora.lora_B, 1)):
            factor.weight.data = place.padded(factor.weight.data, dim, rank)


# -- scale ------------------------------------------------------------------------------------------------------------
class Scaled(Adapter):
    """W + m (W' - W), and the bias likewise: y = m y' + (1 - m) y_0, for a layer's answer is linear in its weight. What stands
    around a block is scaled by its answer, and the block is called once, for its cache would count a second call."""

    def __init__(self, inner: Adapter, multiplier: float) -> None:
        super().__init__()
        self.inner, self.multiplier, self.additive = inner, multiplier, inner.additive
        self.names = {f"inner.{own}": name for own, name in inner.names.items()} | {"inner.": ""}
        self.on_modules = inner.on_modules  # type: ignore[misc] - that of what is scaled

    def weight(self, w: Tensor) -> Tensor:
        return w + self.multiplier * (self.inner.weight(w) - w)

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        after = self.inner.bias(b, w)
        return after if after is None else self.multiplier * after + (0 if b is None else (1 - self.multiplier) * b)

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        before: Any = base(x, *args, **kwargs)
        own = Answered(base, before) if base.op.kind == "module" else base
        after: Any = self.inner(x, own, *args, **kwargs)
        y, z = (t[0] if isinstance(t, tuple) else t for t in (before, after))
        y = y + self.multiplier * (z - y)
        return (y, *after[1:]) if isinstance(after, tuple) else y


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Generator[None]:
    """Within it every adapter does `multiplier` times what it does to the weights, whatever its method."""
    if isinstance(multiplier, bool) or not isinstance(multiplier, (float, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotSupported(f"multiplier={multiplier!r}: a number is needed")
    base = _bare(model)
    prompts = [g for g in groups.groups(base).values() if g.adapter is not None and g.live]
    if prompts:
        kind = method_of(prompts[0].config).name
        raise NotSupported(f"adapter {prompts[0].name!r} ({kind}) changes no weight, so there is nothing to scale")
    found = list(groups.adapted(base))
    if merged := [name for name, layer in found if layer.merged_adapters]:
        raise NotMergeable(f"adapters are merged into {merged[0]!r}, where they cannot be scaled: unmerge_adapter() first")
    if not found:
        raise NoMatch("the model carries no adapter whose scale could be changed")
    before = [(layer, dict(layer.adapters.items())) for _, layer in found]
    several = [(a, a.multiplier) for _, adapters in before for a in adapters.values() if isinstance(a, Parts)]
    try:
        for parts, already in several:  # the layer uses its weights inside, so its answer is not linear in them
            parts.multiplier = already * float(multiplier)
        for layer, adapters in before:
            for name, adapter in adapters.items():
                if not isinstance(adapter, (FullTune, Parts)):
                    layer.adapters[name] = Scaled(adapter, float(multiplier)).train(adapter.training)  # type: ignore[arg-type]
            layer.restack()
        yield
    finally:
        for parts, already in several:
            parts.multiplier = already
        for layer, adapters in before:
            for name, adapter in adapters.items():
                if name in layer.adapters:
                    layer.adapters[name] = adapter
            layer.restack()

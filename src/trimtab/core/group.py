"""`Group`: one named adapter over a whole model, and the verbs on a torch model that carries groups.

Groups stand in a plain dict on the model, `trimtab_groups`, so that an injected model and a wrapped one are the same. Their
tensors belong to the model's modules: a site's to its `AdapterLayer`, shared ones to each site that uses them, a prompt
method's to the model's child `prompt_encoder`.
"""

# pyright: reportPrivateUsage=false
# (torch keeps the children of a module in `_modules`, the one place where one can be exchanged)
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trimtab.call import Call
from trimtab.core.adapter import Adapter, ModelAdapter
from trimtab.core.base import Opaque, port
from trimtab.core.config import PeftConfig, method_of, places
from trimtab.core.full import BiasTune, FullTune
from trimtab.core.layer import AdapterLayer, Named
from trimtab.core.sites import Site, at, find_saved, find_sites, frozen, layers, saved_modules
from trimtab.errors import ConfigError, NoMatch, NotMergeable, nearest
from trimtab.undone import undone


class Group:
    """One named adapter: its config, its layers by path, what its sites share, or its hook around the whole model."""

    def __init__(self, name: str, config: PeftConfig) -> None:
        self.name, self.config, self.kind = name, config, method_of(config).adapter
        self.active = self.disabled = False
        self.layers: dict[str, AdapterLayer] = {}
        self.shared: nn.Module | None = None
        self.adapter: ModelAdapter | None = None
        self.handles: list[Any] = []

    @property
    def live(self) -> bool:
        """Whether the adapter takes part in a forward now."""
        return self.active and not self.disabled

    def sites(self) -> Iterator[tuple[str, Adapter]]:
        for path, layer in self.layers.items():
            yield path, layer.adapters[self.name]  # type: ignore[misc]

    def each(self, kind: type[Adapter]) -> Iterator[tuple[str, Any]]:
        """The adapters of one kind, also where a trained bias stands beside them."""
        return ((path, m) for path, adapter in self.sites() for m in adapter.modules() if isinstance(m, kind))

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(path, published name, tensor) of all that the file holds; path is empty for what stands at the root."""
        for path, adapter in self.sites():
            for key, value in adapter.state_dict(keep_vars=True).items():
                if "shared." not in key:
                    yield path, adapter.published(key), value
        if self.shared is not None:
            for key, value in self.shared.state_dict(keep_vars=True).items():
                yield "", key, value

    def parts(self) -> Iterator[nn.Module]:
        yield from (adapter for _, adapter in self.sites())
        if self.adapter is not None:
            yield self.adapter

    def trainable(self, on: bool) -> None:
        for part in self.parts():
            part.requires_grad_(on)

    def penalty(self) -> Tensor | None:
        return None if self.adapter is not None else self.kind.penalty(self)

    def step(self, step: int) -> None:
        """Called after each optimizer step, while its gradients are there: budgets, projections."""
        if self.adapter is None:
            self.kind.step(self, step)


def groups(model: nn.Module) -> dict[str, Group]:
    return model.__dict__.get("trimtab_groups", {})


def calls(model: nn.Module) -> Call:
    return model.__dict__.setdefault("trimtab_call", Call())


def group(model: nn.Module, name: str) -> Group:
    known = groups(model)
    if name not in known:
        raise NoMatch(
            f"no adapter is called {name!r}; the model carries: {', '.join(known) or 'none'}.{nearest(name, known)}"
        )
    return known[name]


def adapted(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    for name, module in layers(model):
        if isinstance(module, AdapterLayer):
            yield name, module


def attach(
    model: nn.Module, cfg: PeftConfig, name: str = "default", *, full_precision: bool = True, strict: bool = True
) -> Group:
    """Put a new adapter on `model`, in place. It is not active yet. Nothing is changed when this raises."""
    if not name or "." in name or "/" in name or "\\" in name:
        raise ConfigError(
            f"adapter name {name!r}: a name has no dot and no slash, for it becomes a folder and a part of a path"
        )
    if name in groups(model):
        raise ConfigError(f"an adapter is called {name!r} already; delete_adapter({name!r}) first, or choose another name")
    with undone(restore, model):
        for prepare in places(cfg, "prepare"):
            prepare(cfg, model)
        return _attach(model, cfg, name, full_precision, strict)


def restore(model: nn.Module, *, keep: bool = False) -> None:
    """Undo what the adapters that are gone have changed of the model's shape (`layer_replication`), or make it lasting."""
    if not groups(model) and (shape := model.__dict__.pop("trimtab_shape", None)) is not None:
        shape.keep() if keep else shape.undo()


def _attach(model: nn.Module, cfg: PeftConfig, name: str, full_precision: bool, strict: bool) -> Group:
    chosen, new = method_of(cfg), Group(name, cfg)
    plan: dict[str, list[tuple[Site, Adapter]]] = {}
    names = saved_modules(model, cfg, fresh=strict)
    saved = find_saved(model, names, cfg)
    if issubclass(chosen.adapter, ModelAdapter):
        new.adapter = chosen.adapter(cfg, model)
    else:
        sites = find_sites(model, cfg, saved, name, strict=strict)
        new.shared = chosen.adapter.share(cfg, sites)
        for site in (dataclasses.replace(s, shared=new.shared, call=calls(model)) for s in sites):
            plan[site.name] = [(site, site.base.adapt(chosen.adapter, cfg, site))]
    if names:
        cfg.modules_to_save = names  # type: ignore[attr-defined]
    for path, module in saved.items():
        site = Site(path, Opaque(frozen(module)), name)
        plan.setdefault(path, []).append((site, FullTune(site)))
    for extend in places(cfg, "extend"):
        extend(cfg, model, new, plan)
    _plan_biases(model, cfg, new, plan)
    for _, module in layers(model):
        port(frozen(module)).pin()
    if not groups(model):
        model.requires_grad_(False)
        model.__dict__["trimtab_groups"] = {}
    for path, parts in plan.items():
        layer = new.layers[path] = _wrap(model, path)
        for site, adapter in parts:
            layer.add(name, adapter, site, full_precision=full_precision)
    if new.adapter is not None:
        _prompts(model)[name] = new.adapter
        new.handles = new.adapter.attach(model, new)
    groups(model)[name] = new
    new.trainable(False)
    return new


def _plan_biases(model: nn.Module, cfg: PeftConfig, new: Group, plan: dict[str, list[tuple[Site, Adapter]]]) -> None:
    want = getattr(cfg, "bias", "none")
    if want == "none":
        return
    others = [g.name for g in groups(model).values() if getattr(g.config, "bias", "none") != "none"]
    if others:
        raise ConfigError(
            f"adapter {others[0]!r} trains biases already (bias={want!r}); only one adapter of a model can"
        )
    for path, module in layers(model):
        site = Site(path, port(frozen(module)), new.name)
        own = path in plan
        inside = any(path.startswith(f"{p}.") for p in plan)
        if not path or inside or any(isinstance(a, FullTune) for _, a in plan.get(path, [])):
            continue
        if (own or want == "all") and isinstance(getattr(frozen(module), "bias", None), nn.Parameter):
            plan.setdefault(path, []).append((site, BiasTune(site, alone=not own)))


def _prompts(model: nn.Module) -> Named:
    if "prompt_encoder" not in model._modules:
        model.add_module("prompt_encoder", Named())
    return model._modules["prompt_encoder"]  # type: ignore[return-value]


def _wrap(model: nn.Module, path: str) -> AdapterLayer:
    parent, _, leaf = path.rpartition(".")
    owner = frozen(at(model, parent))
    module = owner._modules[leaf]
    assert module is not None
    if not isinstance(module, AdapterLayer):
        owner._modules[leaf] = module = AdapterLayer(module, path, calls(model)).train(module.training)
    return module


def activate(model: nn.Module, names: str | list[str] | tuple[str, ...], *, trainable: bool | None = None) -> None:
    """Make exactly these adapters active, in this order. `trainable`: also what is trained; None leaves that alone."""
    order = (names,) if isinstance(names, str) else tuple(names)
    chosen = [group(model, n) for n in order]
    if sum(g.adapter is not None for g in chosen) > 1:
        raise ConfigError(f"of {', '.join(order)} more than one is a prompt method; one can be active at a time")
    for g in groups(model).values():
        g.active = g.name in order
        if trainable is not None:
            g.trainable(trainable and g.active)
    for _, layer in adapted(model):
        layer.activate(order)


def active(model: nn.Module) -> list[str]:
    """Names of the active adapters in the order they apply."""
    order = [n for _, layer in adapted(model) for n in layer.active]
    return list(dict.fromkeys([*order, *(g.name for g in groups(model).values() if g.active)]))


def delete(model: nn.Module, name: str) -> None:
    """Take an adapter off. The layers it stood on alone are the original ones again."""
    gone = group(model, name)
    if any(name in layer.merged_adapters for layer in gone.layers.values()):
        raise NotMergeable(f"adapter {name!r} is merged; unmerge_adapter() first")
    unhook(model, gone)
    for path, layer in gone.layers.items():
        layer.remove(name)
        if not layer.adapters:
            parent, _, leaf = path.rpartition(".")
            frozen(at(model, parent))._modules[leaf] = layer.base_layer
    del groups(model)[name]
    restore(model)


def unhook(model: nn.Module, gone: Group) -> None:
    for handle in gone.handles:
        handle.remove()
    if gone.adapter is not None:
        del _prompts(model)[gone.name]
        if not _prompts(model):
            del model._modules["prompt_encoder"]

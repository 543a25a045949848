"""Layers that share one weight: a tied output head follows what an adapter does to the embedding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Opaque, port
from trimtab.core.config import method_of
from trimtab.core.full import FullTune
from trimtab.core.sites import frozen, layers
from trimtab.errors import TrimtabWarning

Plan = dict[str, list[tuple[Site, Adapter]]]


def input_embedding(model: nn.Module, adapter: str = "default") -> Site | None:
    get: Any = getattr(model, "get_input_embeddings", None)
    found: Any = get() if callable(get) else None
    if found is None:
        return None
    embedding = frozen(found)
    return next((Site(n, port(embedding), adapter) for n, m in layers(model) if frozen(m) is embedding), None)


def tied_to(site: Site, model: nn.Module) -> Iterator[Site]:
    """Sites of the other layers that hold the very weight of this one."""
    weight = site.base.layer.weight
    for name, module in layers(model):
        layer = frozen(module)
        if layer is not site.base.layer and getattr(layer, "weight", None) is weight:
            yield replace(site, name=name, base=port(layer))


class Follower(Adapter):
    """W' = f(W^T)^T, or f(W) where both are of one kind:  f is the adapter of the layer that W is tied to. Nothing is saved."""

    def __init__(self, leader: Adapter, site: Site, *, turned: bool) -> None:
        super().__init__()
        self.leader, self.turned, self.additive = [leader], turned, leader.additive  # in a list: no submodule
        self.routed = leader.routed

    def weight(self, w: Tensor) -> Tensor:
        return self.leader[0].weight(w.T).T if self.turned else self.leader[0].weight(w)


class Turned(nn.Module):
    """Another factor's weight, transposed; the file holds it as if it were its own."""

    bias = None

    def __init__(self, factor: nn.Module) -> None:
        super().__init__()
        self.factor = [factor]

    @property
    def weight(self) -> Tensor:
        return self.factor[0].weight.T  # type: ignore[union-attr,operator,return-value]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.detach()  # a view: what is read into it is read into the factor

    def _load_from_state_dict(self, *args: Any) -> None:
        """The factor reads it."""


def extend(cfg: Any, model: nn.Module, group: Any, plan: Plan) -> None:
    """`ensure_weight_tying`: what the plan does to one layer that holds the input embedding's weight, it does to all."""
    site = input_embedding(model, group.name)
    followers = [] if site is None else [*tied_to(site, model)]
    if site is None or not followers:
        warnings.warn("ensure_weight_tying: no layer of this model is tied to the input embedding", TrimtabWarning)
        return
    kinds = (FullTune, method_of(cfg).adapter)
    found = [part for s in (site, *followers) for part in plan.get(s.name, []) if isinstance(part[1], kinds)]
    if not found:
        if not any(s.name in plan for s in (site, *followers)):
            warnings.warn("ensure_weight_tying: no tied layer is among the targets or modules_to_save", TrimtabWarning)
        return
    whole = next((part for part in found if isinstance(part[1], FullTune)), None)
    own = [p for p in plan.get(site.name, []) if p in found]
    if whole is not None:
        site = replace(site, base=Opaque(site.base.layer))
        leader: Adapter = own[0][1] if own and isinstance(own[0][1], FullTune) else FullTune(site)
    else:
        site = replace(site, shared=found[0][0].shared)
        leader = own[0][1] if own else kinds[1](cfg, site)
    plan[site.name] = [p for p in plan.get(site.name, []) if p not in found] + [(site, leader)]
    for other in followers:
        rest = [p for p in plan.get(other.name, []) if p not in found]
        plan[other.name] = [*rest, (other, follower(cfg, leader, site, other))]


def follower(cfg: Any, leader: Adapter, site: Site, other: Site) -> Adapter:
    from trimtab.methods.lora import LoRA

    if isinstance(leader, FullTune):
        tied = FullTune(replace(other, base=Opaque(other.base.layer)))
        tied.copy.weight = leader.copy.weight
        return tied
    turned = site.kind != other.kind
    if type(leader) is not LoRA or not turned or cfg.lora_bias:
        return Follower(leader, other, turned=turned)
    lora = LoRA(cfg, other)
    lora.lora_A, lora.lora_B, lora.s = Turned(leader.lora_B), Turned(leader.lora_A), leader.s  # type: ignore[assignment]
    return lora

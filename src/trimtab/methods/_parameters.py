"""`target_parameters`: adapters on parameters that are no layer's weight, as the slabs of experts."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from trimtab.core.adapter import Site
from trimtab.core.base import bases
from trimtab.core.sites import ends_with, frozen, layers, matches
from trimtab.errors import ConfigError, NoMatch, nearest


def sites(cfg: Any, model: nn.Module, adapter: str, others: list[Site]) -> list[Site]:
    """Modules with parameters that the config names by path ends: one site for all of a module's."""
    wanted: list[str] = cfg.target_parameters
    if isinstance(wanted, str):
        raise ConfigError(f"target_parameters={wanted!r}: it is a list of path ends, such as ['experts.down_proj']")
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    for name, module in layers(model):
        layer = frozen(module)
        own = [*(n for n, _ in layer.named_parameters(recurse=False)), *getattr(layer, "parametrizations", {})]
        if (hits := [n for n in own if matches(f"{name}.{n}", wanted)]) and name:
            found[name] = layer, hits
    paths = [f"{name}.{n}" for name, (_, hits) in found.items() for n in hits]
    if missing := [w for w in wanted if not any(ends_with(p, w) for p in paths)]:
        leaves = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.dim() == 3}
        raise NoMatch(
            f"target_parameters names no parameter of a module: {', '.join(map(repr, missing))}.{nearest(missing[0], leaves)}"
        )
    if both := [s.name for s in others if s.name in found]:
        raise ConfigError(f"{both[0]!r} is named by target_modules and by target_parameters: leave out one of the two")
    base = cast(Any, bases()["parameters"])
    return [Site(name, base(layer, hits), adapter) for name, (layer, hits) in found.items()]

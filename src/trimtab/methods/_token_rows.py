"""`trainable_token_indices`: rows of embeddings, trained beside any method."""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import port
from trimtab.core.full import FullTune
from trimtab.core.sites import ends_with, frozen, layers
from trimtab.errors import ConfigError, NoMatch, nearest
from trimtab.methods._tied import input_embedding, tied_to
from trimtab.methods.trainable_tokens import TiedTokens, TrainableTokens, TrainableTokensConfig

Plan = dict[str, list[tuple[Site, Adapter]]]
PUBLISHED = "token_adapter."


def extend(cfg: Any, model: nn.Module, group: Any, plan: Plan) -> None:
    """A list: rows of the input embedding; a dict: of each layer that it names. Tied layers that are not named otherwise
    follow."""
    asked: dict[Site, list[int]] = {s: ids for name, ids in _named(cfg, model, group.name) for s in _sites(model, name, group)}
    for site, ids in asked.items():
        if any(isinstance(a, FullTune) for _, a in plan.get(site.name, [])):
            raise ConfigError(f"{site.name!r} is in modules_to_save, so all of its rows are trained: leave out one of the two")
        followed = [s for s in asked if s is not site and s.base.layer.weight is site.base.layer.weight]
        if site.kind != "embedding" and any(asked[s] == ids and s.kind == "embedding" for s in followed):
            continue  # tied below
        if getattr(cfg, "ensure_weight_tying", False) and any(asked[s] != ids for s in followed):
            raise ConfigError(f"ensure_weight_tying: {site.name!r} and {followed[0].name!r} share one weight, and"
                              " trainable_token_indices names other tokens for each")  # fmt: skip
        rows = TrainableTokens(TrainableTokensConfig(token_indices=list(ids)), site)
        rows.names = {"": PUBLISHED}
        plan.setdefault(site.name, []).append((site, rows))
        for tied in tied_to(site, model) if site.kind == "embedding" else ():
            if not any(s.name == tied.name and asked[s] != ids for s in asked):
                plan.setdefault(tied.name, []).append((tied, TiedTokens(rows, tied)))


def _named(cfg: Any, model: nn.Module, adapter: str) -> list[tuple[str, list[int]]]:
    given: Any = cfg.trainable_token_indices
    if isinstance(given, dict):
        return [*given.items()]
    embedding = input_embedding(model, adapter)
    return [(embedding.name if embedding is not None else "embed_tokens", given)]


def _sites(model: nn.Module, name: str, group: Any) -> list[Site]:
    found = [Site(n, port(frozen(m)), group.name) for n, m in layers(model) if ends_with(n, name)]
    if not found:
        leaves = {n.rpartition(".")[2] for n, _ in layers(model)}
        raise NoMatch(f"trainable_token_indices: no module is called {name!r}.{nearest(name, leaves)}")
    return found

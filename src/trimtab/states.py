"""What a model with adapters answers as: with them, with them written into its weights, or without."""

# pyright: reportPrivateUsage=false
# (torch keeps the children of a module in `_modules`, the one place where one can be exchanged)
from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from trimtab.core.group import active, adapted, group, groups, restore, unhook
from trimtab.core.sites import at, frozen
from trimtab.errors import NoMatch, NotMergeable, TrimtabWarning
from trimtab.undone import undone


def to_merge(model: nn.Module, names: list[str] | str | None = None) -> tuple[str, ...]:
    """The adapters that a merge of `names` (all active ones) takes, in their order; raises where one cannot be merged."""
    names = [names] if isinstance(names, str) else names
    chosen = [group(model, n) for n in (active(model) if names is None else names)]
    if prompts := [g.name for g in chosen if g.adapter is not None]:
        raise NotMergeable(
            f"{prompts[0]!r} is a prompt method: it has no weight to merge into. Keep the adapter folder beside the model"
        )
    if idle := [g.name for g in chosen if not g.active]:
        raise NoMatch(f"adapter {idle[0]!r} is not active, so merging it would change the model; set_adapter first")
    if any(layer.disabled for _, layer in adapted(model)):
        raise NotMergeable("adapters are disabled; merge outside of disable_adapter()")
    if done := {n for _, layer in adapted(model) for n in layer.merged_adapters}.intersection(g.name for g in chosen):
        warnings.warn(f"merged already: {', '.join(sorted(done))}", TrimtabWarning)
    order = tuple(g.name for g in chosen)
    for _, layer in adapted(model):
        layer.mergeable(order)
    return order


def merge(model: nn.Module, names: list[str] | str | None = None, *, safe: bool = False) -> None:
    """Write active adapters into the weights; `unmerge` gives the originals back exactly."""
    order = to_merge(model, names)
    with undone(unmerge, model), torch.no_grad():
        for _, layer in adapted(model):
            layer.merge(order, safe=safe)


def unmerge(model: nn.Module) -> None:
    for _, layer in adapted(model):
        layer.unmerge()


def unload(model: nn.Module) -> None:
    """Take all adapters off, leaving each layer as it is now: merged or original."""
    for g in groups(model).values():
        unhook(model, g)
    stays = any(layer.kept for _, layer in adapted(model))
    for path, layer in list(adapted(model)):
        parent, _, leaf = path.rpartition(".")
        frozen(at(model, parent))._modules[leaf] = layer.base_layer
    for handle in model.__dict__.pop("trimtab_hooks", []):
        handle.remove()
    model.__dict__.pop("trimtab_groups", None)
    restore(model, keep=stays)


def disable(model: nn.Module, off: bool = True) -> None:
    """Let the model answer as the untouched base (`off`) or adapted again; merged adapters are stepped around, not undone."""
    for _, layer in adapted(model):
        layer.disabled = off
        layer.restack()
    for g in groups(model).values():
        g.disabled = off


@contextmanager
def disabled(model: nn.Module) -> Generator[None, None, None]:
    before = any(g.disabled for g in groups(model).values())
    disable(model, True)
    try:
        yield
    finally:
        disable(model, before)

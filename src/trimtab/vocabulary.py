"""Added tokens: an adapter that was made on a longer vocabulary makes its base as long when it is loaded.

The base grows where the file holds every row that it lacks: rows that the adapter trains, or copies of frozen ones, which
other tools write. Any other row would be a random one under a model that was trained with another, so it is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import origin
from trimtab.core.group import groups
from trimtab.core.sites import ends_with, frozen, layers, matches
from trimtab.errors import BadCheckpoint, TrimtabWarning
from trimtab.store import FROZEN, PREFIX
from trimtab.undone import undone

ROWS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
ADDED = re.compile(r"lora_(embedding_)?[AB](\.weight)?")  # beside rows: added to whatever the base has there


def rows(model: Any) -> int | None:
    """How many tokens the input embedding of a model has a row for."""
    return next((len(weight) for weight in _ends(model).values()), None)


def needed(model: nn.Module, config: Any, tensors: Mapping[str, Tensor], path: Path) -> int:
    """How many rows the adapter in a folder was made on: as recorded, else as its tensors and indices tell; 0: unknown."""
    held = [_Held(name, config, tensors) for name in _ends(model)]
    return origin.rows(path) or max((h.least for h in held), default=0)


@contextmanager
def lengthened(
    model: nn.Module, config: Any, tensors: Mapping[str, Tensor], path: Path, *, strict: bool = True
) -> Generator[None]:
    """Within it the base has the rows that the adapter in folder `path` was made on, and it keeps them unless loading
    fails. A longer base stays as it is. Raises `BadCheckpoint` where the file lacks a row; a warning where not `strict`."""
    here, there = rows(model), needed(model, config, tensors, path)
    if here is None or there <= here:
        yield
        return
    said = f"the adapter in {path} was made on {there:,} rows of embeddings, and this base has {here:,}"
    if why := _obstacle(model, config, tensors, there):
        if strict:
            raise BadCheckpoint(
                f"{said}: {why}. Nothing was loaded.\n  Fix: load it on the base with those rows; if new values may stand "
                f"there, model.resize_token_embeddings({there}) before any adapter is put on"
            )
        warnings.warn(f"{said}: {why}", TrimtabWarning)
        yield
        return
    warnings.warn(f"{said}: it is made longer, model.resize_token_embeddings({there})", TrimtabWarning)
    with undone(_resize, model, here):
        _lengthen(model, config, tensors, there)
        yield


class _Held:
    """What a file holds of the rows of one layer."""

    def __init__(self, name: str, config: Any, tensors: Mapping[str, Tensor]) -> None:
        inner = {k.removeprefix(PREFIX): t for k, t in tensors.items()}
        own = {k.removeprefix(f"{name}."): t for k, t in inner.items() if k.startswith(f"{name}.")}
        parts = name.split(".")
        outer = [".".join(parts[: i + 1]) for i in range(len(parts))]
        saved = any(matches(o, list(getattr(config, "modules_to_save", None) or [])) for o in outer)
        copies = [own[k] for k in FROZEN if k in own and (k != "weight" or not saved)]
        self.frozen = next((t for t in copies if t.dim() == 2), None)
        self.whole = own.get("weight") if saved else None
        delta = next((own[k] for k in ROWS if k in own), None)
        ids = _indices(name, config) if delta is not None else []
        self.ids = ids if delta is not None and len(delta) == len(ids) else []
        self.changed = not saved and any(k not in (*ROWS, *FROZEN) and not ADDED.fullmatch(k) for k in own)

    @property
    def least(self) -> int:
        copies = [len(t) for t in (self.frozen, self.whole) if t is not None and t.dim() == 2]
        return max([*copies, *(i + 1 for i in self.ids)], default=0)

    def has(self, start: int, stop: int) -> bool:
        """Whether what stands in these rows follows from the file alone."""
        trained = len({i for i in self.ids if start <= i < stop}) == stop - start
        return not self.changed and (trained or (self.whole is not None and len(self.whole) >= stop))


def _indices(name: str, config: Any) -> list[int]:
    asked: Any = getattr(config, "token_indices", None) or getattr(config, "trainable_token_indices", None) or []
    if isinstance(asked, dict):
        return next((list(ids) for layer, ids in asked.items() if ends_with(name, layer)), [])
    return list(asked)


def _ends(model: Any) -> dict[str, Tensor]:
    """The weights with a row for each token, by the paths of their layers: the input embedding's first, the output layer's,
    and those that are tied to one of them."""
    found: list[Tensor] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer: Any = getattr(model, name, lambda: None)()
        except (NotImplementedError, AttributeError):  # models of other things than text
            continue
        layer = frozen(layer) if isinstance(layer, nn.Module) else layer
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and (found or isinstance(layer, nn.Embedding)):
            found.append(weight)
    held = {name: getattr(frozen(module), "weight", None) for name, module in layers(model)} if found else {}
    return {name: weight for weight in found for name, own in held.items() if own is weight}


def _obstacle(model: Any, config: Any, tensors: Mapping[str, Tensor], size: int) -> str:
    """Why the base must not be made so long; empty where it may."""
    if others := ", ".join(map(repr, groups(model))):
        return f"it carries {others} already, and a longer base would be another one under them"
    if not hasattr(model, "resize_token_embeddings"):
        return f"a {type(model).__name__} cannot be made longer"
    ends = _ends(model)
    if odd := [f"{name!r} ({len(weight):,})" for name, weight in ends.items() if len(weight) != rows(model)]:
        return f"{odd[0]} has another number of rows, so what one of them lacks does not tell what the others do"
    held = {name: _Held(name, config, tensors) for name in ends}
    for name, weight in ends.items():
        tied = [held[n] for n, w in ends.items() if w is weight]
        if any(h.frozen is not None and len(h.frozen) >= size for h in tied):
            continue
        embedded = [h for n, h in held.items() if h in tied and isinstance(frozen(model.get_submodule(n)), nn.Embedding)]
        held[name].ids = held[name].ids or next((h.ids for h in embedded if h.ids), [])  # what is tied to it follows
        if not held[name].has(len(weight), size):
            return f"the file does not hold all of the rows {len(weight):,} to {size - 1:,} of {name!r}"
    return ""


def _lengthen(model: Any, config: Any, tensors: Mapping[str, Tensor], size: int) -> None:
    """New rows are those that a file has copies of; else zeros, for the adapter's own stand in their place."""
    ends = _ends(model)
    before = {name: len(weight) for name, weight in ends.items()}
    copies = {n: h.frozen for n in ends if (h := _Held(n, config, tensors)).frozen is not None and len(h.frozen) >= size}
    tied = {n: next((copies[m] for m, other in ends.items() if other is w and m in copies), None) for n, w in ends.items()}
    _resize(model, size)
    with torch.no_grad():
        for name, weight in _ends(model).items():
            copy, start = tied[name], before[name]
            weight[start:] = 0 if copy is None else copy[start : len(weight)].to(weight)


def _resize(model: Any, size: int) -> None:
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # it draws rows, which do not stay
        model.resize_token_embeddings(size, mean_resizing=False)

"""Rotary positions that depend on the longest row of a forward pass: no other row may share one with a long row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trimtab.errors import ConfigError


def changes_at(config: Any) -> int | None:
    """A row of more tokens than this has other rotary frequencies, and with it, in transformers, every row of its pass. None:
    all rows have the same."""
    return min((at for _, at in _changes(config)), default=None)


def alone(config: Any, lengths: Iterable[int], together: int) -> None:
    """Raises `ConfigError` where batches of so many rows `together` would hold one that is to be alone. Frequencies that grow
    with the row (dynamic NTK) also stay as the last long row left them, so such a row is not even right by itself."""
    changes = _changes(config)
    grows = any(kind == "dynamic" for kind, _ in changes)
    if not changes or (together < 2 and not grows):
        return
    at, longest = min(at for _, at in changes), max(lengths, default=0)
    if longest > at:
        fix = f"max_length {at}" if grows else f"micro_batch_size 1, or max_length {at}"
        raise ConfigError(
            f"a row has {longest:,} tokens, and beyond {at:,} this model's positions depend on the other rows of its batch"
            f"{' and of those before' if grows else ''}. Fix: {fix}"
        )


def _changes(config: Any) -> list[tuple[str, int]]:
    """Kinds of rotary positions, and beyond how many tokens they change."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    found: list[tuple[str, int]] = []
    for one in (rope, *rope.values()):  # some models have one for each kind of layer
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind == "longrope":
            found.append((kind, one["original_max_position_embeddings"]))
        elif kind == "dynamic":
            found.append((kind, config.max_position_embeddings))
    return found

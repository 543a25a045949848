"""Examples to the batches of one forward pass: padded, or left together for the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.data import Example, collate
from trimtab.errors import DataError

MICRO = 8  # examples in one forward pass, at most, where the user leaves the choice to us
ROWS = "rows"  # optional in a batch: where each of its rows comes from, `file:line`
EXAMPLES = "examples"  # the one entry of a batch that the engine lays out


class Collator:
    """Pads examples to the longest of a batch, and keeps where each comes from: errors name it. `rows=False`: does not."""

    def __init__(self, pad_token_id: int, *, rows: bool = True) -> None:
        self.pad_token_id, self.rows = pad_token_id, rows

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        examples = as_examples(rows)
        places = {ROWS: [f"{e.source}:{e.line}" for e in examples]} if self.rows else {}
        return {**collate(examples, self.pad_token_id), **places}


class Together:
    """Leaves the examples of a step as they are: the engine lays them out."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, list[Example]]:
        return {EXAMPLES: as_examples(rows)}


def as_examples(rows: Sequence[Any]) -> list[Example]:
    """Rows are `Example`s, or have `input_ids` and `labels`, which are the ids themselves or -100. Tokens that an
    `attention_mask` hides are left out."""
    return [_example(row, i) if isinstance(row, Mapping) else row for i, row in enumerate(rows)]


def _example(row: Mapping[str, Any], number: int) -> Example:
    ids = [int(i) for i in row["input_ids"]]
    labels = [int(i) for i in row.get("labels", ids)]
    seen = [bool(m) for m in row.get("attention_mask", [1] * len(ids))]
    if not len(ids) == len(labels) == len(seen) > 0:
        found = f"{len(ids)} input_ids, {len(labels)} labels and an attention_mask of {len(seen)}"
        raise DataError(f"row {number + 1} of a batch has {found}. Fix: all as long, and not empty")
    if any(label not in (token, -100) or (label != -100 and not m) for token, label, m in zip(ids, labels, seen, strict=True)):
        raise DataError(
            f"row {number + 1} of a batch: labels are neither -100 nor the token at their place. Fix: labels as long as "
            f"input_ids, not shifted, -100 for what the attention_mask hides; or pass a data_collator of your own"
        )
    kept = [i for i, m in enumerate(seen) if m]
    return Example([ids[i] for i in kept], [labels[i] != -100 for i in kept], "batch", number + 1)


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def micro_size(batch_size: int, asked: int | None) -> int:
    """Examples in a forward pass on each rank: what was asked, or the largest divisor of the rank's share up to 8."""
    return asked or max(d for d in divisors(batch_size // ranks()) if d <= MICRO)

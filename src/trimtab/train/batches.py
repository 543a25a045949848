"""Examples to the batches of one forward pass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from trimtab.data import Example, collate
from trimtab.train.trainer import ROWS

MICRO = 8  # examples in one forward pass, at most, where the user leaves the choice to us


class Collator:
    """Pads examples to the longest of a batch, and keeps where each comes from: errors name it."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        return {**collate(examples, self.pad_token_id), ROWS: [f"{e.source}:{e.line}" for e in examples]}


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def micro_size(batch_size: int, asked: int | None) -> int:
    """Examples in a forward pass on each rank: what was asked, or the largest divisor of the rank's share up to 8."""
    return asked or max(d for d in divisors(batch_size // ranks()) if d <= MICRO)

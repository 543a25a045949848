"""How a run lays its steps out: in packs of a token budget, which halves when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trimtab.data.encode import Example
from trimtab.data.pack import Pack, packs
from trimtab.engine.forward import Engine
from trimtab.engine.memory import Watch, token_bytes
from trimtab.errors import DataError, TrainingError

EXAMPLES = "examples"  # the one entry of a batch that is to be packed
SMALLEST = 64  # tokens; below this a smaller budget helps no more
DEFAULT = {"cpu": 2048}
ELSEWHERE = 16384


class Packing:
    """An engine and the budget of its packs.

    tokens: computed positions in one forward pass; None: chosen from the model and the memory. rows: at most so many
    examples in one pass. `share`: compute what examples begin with in common once.
    """

    def __init__(
        self, engine: Engine, tokens: int | None = None, *, rows: int | None = None, share: bool = True,
        memory_limit: int | None = None, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.engine, self.rows, self.share, self.say = engine, rows, share, say
        self.tokens = tokens or _budget(engine.model)
        engine.watch = Watch(memory_limit) if next(engine.model.parameters()).device.type == "cpu" else None

    def packs(self, examples: Sequence[Example]) -> list[Pack]:
        """The step's examples, laid out."""
        if self.rows is None:
            return packs(examples, self.tokens, share=self.share)
        found = []
        for at in range(0, len(examples), self.rows):
            some = range(at, min(at + self.rows, len(examples)))
            for p in packs([examples[i] for i in some], self.tokens, share=self.share):
                found.append(_moved(p, at))
        return found

    def halve(self, error: BaseException) -> None:
        """A smaller budget for the step that is done again, and all after it."""
        if self.tokens // 2 < SMALLEST:
            raise TrainingError(
                f"out of memory with {self.tokens} tokens in one pass ({error}). Fewer tokens will not help: "
                f"--load_in_4bit, --gradient_checkpointing or a smaller model will"
            ) from error
        self.tokens //= 2
        self.say(f"out of memory: {self.tokens:,} tokens in one pass from here on; the step is done again, nothing is lost")


def _moved(p: Pack, by: int) -> Pack:
    return replace(p, members=tuple(i + by for i in p.members))


def _budget(model: Any) -> int:
    """What half the free memory of the device holds, a power of two, at most what is worth having."""
    parameter = next(model.parameters())
    device, most = parameter.device, DEFAULT.get(parameter.device.type, ELSEWHERE)
    if device.type != "cuda":
        return most
    free = torch.cuda.mem_get_info(device)[0] // 2
    fits = max(256, free // token_bytes(model.config, model.dtype.itemsize))
    return min(most, 1 << (int(fits).bit_length() - 1))


class Together:
    """A collator that leaves examples as they are: the engine lays them out. Rows are `Example`s, or have `input_ids` and
    `labels`, which are the ids themselves or -100."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, list[Example]]:
        return {EXAMPLES: [row if isinstance(row, Example) else _example(row, i) for i, row in enumerate(rows)]}


def _example(row: Mapping[str, Any], number: int) -> Example:
    ids = [int(i) for i in row["input_ids"]]
    labels = [int(i) for i in row.get("labels", ids)]
    mask = [label != -100 for label in labels]
    if len(labels) != len(ids) or any(a != b for a, b, kept in zip(ids, labels, mask, strict=True) if kept):
        raise DataError(
            f"row {number + 1} of a batch: labels are neither -100 nor the token at their place. Fix: labels as long as "
            f"input_ids, not shifted; or pass a data_collator of your own"
        )
    return Example(ids, mask, "batch", number + 1)

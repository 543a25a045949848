"""How a run lays its steps out: in packs of a token budget, which halves when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from trimtab.data.encode import Example
from trimtab.data.pack import Pack, pack, packs
from trimtab.engine.forward import Engine
from trimtab.engine.memory import Watch, out_of_memory, release, token_bytes
from trimtab.engine.rope import alone, changes_at
from trimtab.errors import TrainingError

SMALLEST = 64  # tokens; below this a smaller budget helps no more
DEFAULT = {"cpu": 1536}  # more was no faster, and took more memory
ELSEWHERE = 16384

T = TypeVar("T")


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

    @property
    def line(self) -> str:
        shared = "; what examples begin with in common is computed once" if self.share else ""
        return f"packs of up to {self.tokens:,} tokens{shared}"

    def packs(self, examples: Sequence[Example]) -> list[Pack]:
        """The step's examples, laid out. Those whose length changes the positions of a whole pass are alone in theirs."""
        at = changes_at(self.engine.model.config)
        far = [i for i, e in enumerate(examples) if at is not None and len(e.input_ids) > at]
        alone(self.engine.model.config, [len(examples[i].input_ids) for i in far], 1)
        near = sorted({*range(len(examples))} - {*far})
        rows, found = self.rows or max(1, len(near)), []
        for a in range(0, len(near), rows):
            some = near[a : a + rows]
            for p in packs([examples[i] for i in some], self.tokens, share=self.share):
                found.append(replace(p, members=tuple(some[m] for m in p.members)))
        return found + [pack(examples, [i], whole=True) for i in far]

    def attempt(self, work: Callable[[], T], undo: Callable[[], None], *, again: bool = True) -> T:
        """`work`, with the model's attention reading layouts; where memory runs out, undone and done with half the budget.

        again: without it, running out of memory is an error. Several ranks would have to start again together.
        """
        while True:
            try:
                with self.engine.running(training=torch.is_grad_enabled()):
                    return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(error, again)
            release()  # here, where the error no longer holds the frames, and they what was computed
            undo()

    def _halve(self, error: BaseException, again: bool) -> None:
        """A smaller budget for what is done again, and all after it."""
        if not again:
            raise TrainingError(
                f"out of memory ({error}). Give fewer --pack_tokens than {self.tokens}, the same on all ranks"
            ) from error
        if self.tokens // 2 < SMALLEST:
            raise TrainingError(
                f"out of memory with {self.tokens} tokens in one pass ({error}). Fewer tokens will not help: "
                f"--load_in_4bit, --gradient_checkpointing or a smaller model will"
            ) from error
        self.tokens //= 2
        self.say(f"out of memory: {self.tokens:,} tokens in one pass from here on; the step is done again, nothing is lost")


def remembered(model: nn.Module, *, gradients: bool) -> Callable[[], None]:
    """Call the result to have random numbers and gradients again as they are now. `gradients`: whether there may be any."""
    device = next(model.parameters()).device
    sources: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    states = [source.get_rng_state() for source in sources]
    kept = {p: p.grad.clone() for p in model.parameters() if p.grad is not None} if gradients else {}

    def back() -> None:
        for source, state in zip(sources, states, strict=True):
            source.set_rng_state(state)
        for p in model.parameters():
            p.grad = kept[p].clone() if p in kept else None

    return back


def _budget(model: Any) -> int:
    """What half the free memory of the device holds, a power of two, at most what is worth having."""
    parameter = next(model.parameters())
    device, most = parameter.device, DEFAULT.get(parameter.device.type, ELSEWHERE)
    if device.type != "cuda":
        return most
    free = torch.cuda.mem_get_info(device)[0] // 2
    fits = max(256, free // token_bytes(model.config, model.dtype.itemsize))
    return min(most, 1 << (int(fits).bit_length() - 1))

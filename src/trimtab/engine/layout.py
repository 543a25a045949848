"""`Layout`: how the tokens of a packed row belong together, as attention reads it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trimtab.data.pack import Segment, ends
from trimtab.engine.memory import Watch

PIECE = 256  # longer segments are attended piece by piece: the scores of one piece are all that is held at a time
SHORTEST = 16  # lengths are rounded up to powers of two from here on, so that segments of like length go together

_numbers = itertools.count()
_living: weakref.WeakValueDictionary[int, Layout] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Block:
    """Segments of like length that follow the same tokens: attended together."""

    count: int
    length: int  # of each, with its padding
    first: int  # position of their first tokens in their examples
    before: tuple[tuple[int, int], ...]  # (start, length) in the row of what they follow, in order
    rows: Tensor  # (count * length,) int64: where their tokens lie in the row; padding repeats a segment's last token


class Layout:
    """The segments of one packed row of `T` tokens, on `device`.

    It travels through a model as `handle`, a tensor with a number, so that compiled code sees the same kind of argument
    at each step; `Layout.of` finds it again. `calls` counts the attention layers that have read it, and `watch` is asked
    each time whether memory still holds.
    """

    def __init__(
        self, segments: Sequence[Segment], device: torch.device | str = "cpu", watch: Watch | None = None
    ) -> None:
        self.segments, self.device, self.watch = tuple(segments), torch.device(device), watch
        self.length = sum(s.length for s in segments)
        self.calls = 0
        number = next(_numbers)
        _living[number] = self
        self.handle = torch.tensor(number)

    @staticmethod
    def of(handle: Tensor) -> Layout:
        return _living[int(handle)]

    def read(self) -> Layout:
        """An attention layer has it in hand."""
        self.calls += 1
        if self.watch is not None:
            self.watch.look()
        return self

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,): the place of each token in its examples."""
        places = [np.arange(s.offset, s.offset + s.length) for s in self.segments]
        return torch.from_numpy(np.concatenate(places)).to(self.device)

    @cached_property
    def end(self) -> Tensor:
        """(T,): token i sees token j where `j <= i < end[j]`."""
        return torch.from_numpy(ends(self.segments)).to(self.device)

    def visible(self, window: int = 0) -> Tensor:
        """(T, T) bool: which tokens (columns) each token (rows) sees; with a window only the last `window` of them."""
        i = torch.arange(self.length, device=self.device)
        seen = (i[None, :] <= i[:, None]) & (i[:, None] < self.end[None, :])
        if window:
            seen &= self.position_ids[:, None] - self.position_ids[None, :] < window
        return seen

    @cached_property
    def blocks(self) -> list[Block]:
        groups: dict[tuple[int, int, tuple[tuple[int, int], ...]], list[tuple[int, int]]] = {}
        paths: list[tuple[tuple[int, int], ...]] = []
        for s in self.segments:
            path = paths[s.parent] if s.parent >= 0 else ()
            for at in range(0, s.length, PIECE):
                run = (s.start + at, min(PIECE, s.length - at))
                size = max(SHORTEST, 1 << (run[1] - 1).bit_length())
                groups.setdefault((size, s.offset + at, path), []).append(run)
                path = _joined(path, run)
            paths.append(path)
        return [self._block(*key, runs) for key, runs in groups.items()]

    def _block(self, size: int, first: int, path: tuple[tuple[int, int], ...], runs: list[tuple[int, int]]) -> Block:
        length = min(size, max(n for _, n in runs))
        rows = [start + np.minimum(np.arange(length), n - 1) for start, n in runs]
        return Block(len(runs), length, first, path, torch.from_numpy(np.concatenate(rows)).to(self.device))

    @cached_property
    def place(self) -> Tensor:
        """(T,): where each token of the row stands when the blocks' rows are laid end to end."""
        every = torch.cat([b.rows for b in self.blocks]).cpu().numpy()
        # a segment's last token is repeated behind it: the first of its places is the real one
        return torch.from_numpy(np.unique(every, return_index=True)[1]).to(self.device)


def _joined(path: tuple[tuple[int, int], ...], run: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """`path` with `run` behind it; as one where the two lie side by side."""
    if path and sum(path[-1]) == run[0]:
        return (*path[:-1], (path[-1][0], path[-1][1] + run[1]))
    return (*path, run)

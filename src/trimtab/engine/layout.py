"""`Layout`: how the tokens of a packed row belong together, as attention reads it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.data.pack import Segment, ends
from trimtab.engine.memory import Watch

PIECE = 256  # longer segments are attended piece by piece: the scores of one piece are all that is held at a time
SHORTEST = 32  # lengths are rounded up to powers of two from here on, so that segments of like length go together
WIDE = 32  # keys are filled up to multiples of this: rows of odd length are several times slower on a CPU

Runs = tuple[tuple[int, int], ...]
_numbers = itertools.count()
_living: weakref.WeakValueDictionary[int, Layout] = weakref.WeakValueDictionary()


class _Once:
    """Makes each thing that is asked for under a key once."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Block(_Once):
    """Segments of like length that follow the same tokens: attended together.

    Each of `count` segments asks with `length` tokens and sees `seen` ones: the `known` that it follows, then its own. Where a
    segment is shorter its last token stands again; `seen` is filled up likewise to a multiple of `WIDE`.
    """

    def __init__(self, before: Runs, runs: list[tuple[int, int]], length: int, device: torch.device) -> None:
        super().__init__()
        self.count, self.length = len(runs), length
        self.before = before  # (start, length) in the row of what they follow, in order
        self.known = sum(n for _, n in before)  # so the segments' own tokens have positions from here on
        self.seen = -(-(self.known + length) // WIDE) * WIDE
        path = [np.arange(a, a + n) for a, n in before]
        own = [start + np.minimum(np.arange(self.seen - self.known), n - 1) for start, n in runs]
        rows = np.stack(own)[:, :length]
        put = lambda x: torch.from_numpy(x).to(device)  # noqa: E731
        self.rows = put(rows.reshape(-1))  # (count * length,): where their tokens lie in the row
        self.keys = put(np.concatenate([part for run in own for part in (*path, run)]))  # (count * seen,)
        self._real = put(np.stack([np.arange(length) < n for _, n in runs]))  # (count, length): no token that stands again

    def heads(self, per: int, tokens: int) -> Tensor:
        """(count * per * length,): the rows of `per` heads, where those of one head stand `tokens` behind another's."""
        step = torch.arange(per, device=self.rows.device)[:, None] * tokens
        return self.once(("heads", per), lambda: (self.rows.view(self.count, 1, -1) + step).reshape(-1))

    def real(self, kv: int, per: int, dtype: torch.dtype) -> Tensor:
        """1 for tokens and 0 for what stands again; to multiply (kv heads * count, per * length, .)."""

        def make() -> Tensor:
            return self._real.repeat(kv, per)[:, :, None].to(dtype)

        return self.once(("real", kv, per, dtype), make)

    def bias(self, per: int, window: int, dtype: torch.dtype) -> Tensor:
        """(per * length, seen) to be added to scores: 0, or -inf for what a token may not see."""

        def make() -> Tensor:
            i = torch.arange(self.known, self.known + self.length, device=self.rows.device)[:, None]
            j = torch.arange(self.seen, device=self.rows.device)
            hidden = (j > i) | (i - j >= window) if window else j > i  # all that is known comes before: j < known <= i
            return torch.zeros(hidden.shape, dtype=dtype, device=i.device).masked_fill(hidden, -torch.inf).repeat(per, 1)

        return self.once(("bias", per, window, dtype), make)


class Layout(_Once):
    """The segments of one packed row of `T` tokens, on `device`.

    It travels through a model as `handle`, a tensor with a number, so that compiled code sees the same kind of argument
    at each step; `Layout.of` finds it again. `calls` counts the attention layers that have read it, and `watch` is asked
    each time whether memory still holds.
    """

    def __init__(
        self, segments: Sequence[Segment], device: torch.device | str = "cpu", watch: Watch | None = None
    ) -> None:
        super().__init__()
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
        groups: dict[tuple[int, Runs], list[tuple[int, int]]] = {}
        paths: list[Runs] = []
        for s in self.segments:
            path = paths[s.parent] if s.parent >= 0 else ()
            for at in range(0, s.length, PIECE):
                run = (s.start + at, min(PIECE, s.length - at))
                size = max(SHORTEST, 1 << (run[1] - 1).bit_length())
                groups.setdefault((size, path), []).append(run)
                path = _joined(path, run)
            paths.append(path)
        made = []
        for (size, path), runs in groups.items():
            length = min(size, max(n for _, n in runs))
            made.append(Block(path, runs, length, self.device))
        return made

    @cached_property
    def place(self) -> Tensor:
        """(T,): where each token of the row stands when the blocks' rows are laid end to end."""
        every = torch.cat([b.rows for b in self.blocks]).cpu().numpy()
        # a segment's last token is repeated behind it: the first of its places is the real one
        return torch.from_numpy(np.unique(every, return_index=True)[1]).to(self.device)


def _joined(path: Runs, run: tuple[int, int]) -> Runs:
    """`path` with `run` behind it; as one where the two lie side by side."""
    if path and sum(path[-1]) == run[0]:
        return (*path[:-1], (path[-1][0], path[-1][1] + run[1]))
    return (*path, run)

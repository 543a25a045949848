"""`Layout`: how the tokens of a packed row belong together, as attention reads it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.data.pack import Segment, ends
from trimtab.engine.memory import Watch

PIECE, PIECES = 128, 8  # longer segments are attended piece by piece, so that little is computed that may not be seen
SHORTEST = 32  # lengths are rounded up to powers of two from here on, so that segments of like length go together
EVEN = 8  # lengths of rows and blocks are multiples of this: others are up to a quarter slower in bfloat16 on a CPU, and each
# new shape of a product costs 2 ms
WIDE = 32  # keys are filled up to multiples of this: rows of odd length are several times slower on a CPU

Runs = tuple[tuple[int, int], ...]
_numbers = itertools.count(1)
_living: weakref.WeakValueDictionary[int, Layout] = weakref.WeakValueDictionary()


class _Once:
    """Makes each thing that is asked for under a key once."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Heads(NamedTuple):
    """How many heads ask, and how many keys and values they share."""

    q: int
    kv: int

    @property
    def per(self) -> int:
        return self.q // self.kv


class Block(_Once):
    """Segments of like length that follow equally many tokens: attended together.

    Each of `count` segments asks with `length` tokens and sees `seen` ones: the `known` that it follows, then its own. Where a
    segment is shorter its last token stands again; `seen` is filled up likewise to a multiple of `WIDE`.
    """

    def __init__(self, runs: list[tuple[Runs, int, int]], length: int, device: torch.device) -> None:
        """runs: for each segment what it follows as (start, length) in the row, where it starts, and its length."""
        super().__init__()
        self.count, self.length, self.device = len(runs), length, device
        self.known = sum(n for _, n in runs[0][0])  # so the segments' own tokens have positions from here on
        self.seen = -(-(self.known + length) // WIDE) * WIDE
        keys = []
        for before, start, n in runs:
            own = start + np.minimum(np.arange(self.seen - self.known), n - 1)
            keys.append(np.concatenate([*(np.arange(a, a + m) for a, m in before), own]))
        self.keys = np.stack(keys)  # (count, seen): rows of the tokens that may be seen
        self.rows = self.keys[:, self.known : self.known + length]  # (count, length): of those that ask
        lengths = np.array([n for _, _, n in runs])[:, None]
        self.asking = np.arange(length) < lengths  # (count, length): those that do not stand again
        self.shown = np.arange(self.seen) < self.known + lengths  # (count, seen): likewise

    def asks(self, heads: Heads) -> np.ndarray:
        """(kv, count, per, length): token * heads + head of all that ask."""
        head = np.arange(heads.q).reshape(heads.kv, 1, heads.per, 1)
        return self.rows[None, :, None] * heads.q + head

    def asks_of(self, heads: Heads) -> Tensor:
        return self.once(("asks", heads), lambda: self._put(self.asks(heads).reshape(-1)))

    def keys_of(self, heads: Heads) -> Tensor:
        """(kv * count * seen,): token * kv + head of all that is seen."""
        head = np.arange(heads.kv)[:, None, None]
        return self.once(("keys", heads), lambda: self._put((self.keys * heads.kv + head).reshape(-1)))

    def real(self, heads: Heads, dtype: torch.dtype) -> Tensor:
        """(kv * count, per * length, 1): 1 for tokens and 0 for what stands again."""

        def make() -> Tensor:
            return self._put(self.asking).repeat(heads.kv, heads.per)[:, :, None].to(dtype)

        return self.once(("real", heads, dtype), make)

    def bias(self, per: int, window: int, dtype: torch.dtype) -> Tensor:
        """(per * length, seen) to be added to scores: 0, or -inf for what a token may not see."""

        def make() -> Tensor:
            i = torch.arange(self.known, self.known + self.length, device=self.device)[:, None]
            j = torch.arange(self.seen, device=self.device)
            hidden = (j > i) | (i - j >= window) if window else j > i  # all that is known comes before: j < known <= i
            return torch.zeros(hidden.shape, dtype=dtype, device=i.device).masked_fill(hidden, -torch.inf).repeat(per, 1)

        return self.once(("bias", per, window, dtype), make)

    def _put(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device)


class Layout(_Once):
    """The segments of one packed row of `T` tokens, on `device`.

    It travels through a model as `handle`, a tensor with a number, so that compiled code sees the same kind of argument
    at each step; `Layout.of` finds it again. `calls` counts the attention layers that have read it, and `watch` is asked
    each time whether memory still holds. Attention weights are `kept` for the backward while they take no more than `room`.
    """

    def __init__(
        self, segments: Sequence[Segment], device: torch.device | str = "cpu", watch: Watch | None = None
    ) -> None:
        super().__init__()
        self.segments, self.device, self.watch = tuple(segments), torch.device(device), watch
        self.length = sum(s.length for s in segments)
        self.calls, self.room = 0, 0
        self.kept: dict[int, list[Tensor]] = {}
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

    def keep(self, heads: Heads, itemsize: int) -> tuple[int, list[Tensor] | None]:
        """A list for the attention weights of one call, and the number under which `kept` has it; 0 and None without room."""
        size = heads.q * itemsize * sum(b.count * b.length * b.seen for b in self.blocks)
        if size > self.room:
            return 0, None
        self.room -= size
        number = next(_numbers)
        return number, self.kept.setdefault(number, [])

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
        piece = max(PIECE, 1 << (max(s.length for s in self.segments) // PIECES).bit_length())
        groups: dict[tuple[int, int], list[tuple[Runs, int, int]]] = {}
        paths: list[Runs] = []
        for s in self.segments:
            path = paths[s.parent] if s.parent >= 0 else ()
            for at in range(0, s.length, piece):
                run = (s.start + at, min(piece, s.length - at))
                size = max(SHORTEST, 1 << (run[1] - 1).bit_length())
                groups.setdefault((size, s.offset + at), []).append((path, *run))
                path = _joined(path, run)
            paths.append(path)
        sized = ((min(size, -(-max(n for _, _, n in runs) // EVEN) * EVEN), runs) for (size, _), runs in groups.items())
        return [Block(runs, length, self.device) for length, runs in sized]

    def place(self, heads: Heads) -> Tensor:
        """(T * heads,): where each token's answer of each head stands when all blocks' answers are laid end to end."""

        def make() -> Tensor:
            place = np.empty(self.length * heads.q, dtype=np.int64)
            at = 0
            for block in self.blocks:
                asks = block.asks(heads)
                real = np.broadcast_to(block.asking[None, :, None], asks.shape)
                place[asks[real]] = at + np.flatnonzero(real)
                at += asks.size
            return torch.from_numpy(place).to(self.device)

        return self.once(("place", heads), make)

    def bags(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """For each token and head of keys: where it stands when all blocks' keys are laid end to end, one after the other,
        and where its places begin among them, `(T * kv,)`."""

        def make() -> tuple[Tensor, Tensor]:
            tokens, places = [], []
            at = 0
            for block in self.blocks:
                head = np.arange(heads.kv)[:, None, None]
                shown = np.broadcast_to(block.shown, (heads.kv, *block.shown.shape))
                tokens.append((block.keys * heads.kv + head)[shown])
                places.append(at + np.flatnonzero(shown))
                at += shown.size
            token = np.concatenate(tokens)
            order = np.argsort(token, kind="stable")
            starts = np.searchsorted(token[order], np.arange(self.length * heads.kv))
            put = lambda x: torch.from_numpy(x).to(self.device)  # noqa: E731
            return put(np.concatenate(places)[order]), put(starts)

        return self.once(("bags", heads), make)


def _joined(path: Runs, run: tuple[int, int]) -> Runs:
    """`path` with `run` behind it; as one where the two lie side by side."""
    if path and sum(path[-1]) == run[0]:
        return (*path[:-1], (path[-1][0], path[-1][1] + run[1]))
    return (*path, run)

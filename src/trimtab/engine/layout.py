"""`Layout`: how the tokens of a packed row belong together, as attention reads it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.data.pack import Segment, ends
from trimtab.engine.memory import Watch

PIECE = 128  # longer segments are attended piece by piece, so that little is computed that may not be seen
LARGEST = 1 << 20  # scores of one head in one block, about, so that no block takes much memory
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

    def __init__(self, runs: list[tuple[Runs, int, int]], length: int, all_: Blocks) -> None:
        """runs: for each segment what it follows as (start, length) in the row, where it starts, and its length."""
        super().__init__()
        self.count, self.length, self.all = len(runs), length, all_
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

    def bias(self, per: int, dtype: torch.dtype) -> Tensor:
        """(per * length, n) to be added to scores of the last n that are seen: 0, or -inf for what a token may not see."""

        def make() -> Tensor:
            window, device = self.all.window, self.all.device
            i = torch.arange(self.known, self.known + self.length, device=device)[:, None]
            j = torch.arange(0 if window else self.known, self.seen, device=device)  # without one all that is known is seen
            hidden = (j > i) | (i - j >= window) if window else j > i
            return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, -torch.inf).repeat(per, 1)

        return self.all.once(("bias", self.known, self.length, self.seen, per, dtype), make)

    def _put(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.all.device)


class Blocks(_Once):
    """All of a row's segments as blocks, for attention that sees `window` tokens, or all with 0."""

    def __init__(self, segments: Sequence[Segment], window: int, device: torch.device) -> None:
        super().__init__()
        self.window, self.device, self.length = window, device, sum(s.length for s in segments)
        groups: dict[tuple[int, int], list[tuple[Runs, int, int]]] = {}
        paths: list[Runs] = []
        for s in segments:
            path = paths[s.parent] if s.parent >= 0 else ()
            for at in range(0, s.length, PIECE):
                run = (s.start + at, min(PIECE, s.length - at))
                size = max(SHORTEST, 1 << (run[1] - 1).bit_length())
                before = _last(path, window - 1) if window else path
                groups.setdefault((size, sum(n for _, n in before)), []).append((before, *run))
                path = _joined(path, run)
            paths.append(path)
        self.blocks: list[Block] = []
        for (size, known), runs in groups.items():
            length = min(size, -(-max(n for _, _, n in runs) // EVEN) * EVEN)
            most = max(1, LARGEST // (length * (known + length)))
            self.blocks += [Block(runs[at : at + most], length, self) for at in range(0, len(runs), most)]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def scores(self) -> int:
        """How many scores one head has."""
        return sum(b.count * b.length * b.seen for b in self)

    def place(self, heads: Heads) -> Tensor:
        """(T * heads,): where each token's answer of each head stands when all blocks' answers are laid end to end."""

        def make() -> Tensor:
            place = np.empty(self.length * heads.q, dtype=np.int64)
            at = 0
            for block in self:
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
            for block in self:
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


class Layout(_Once):
    """The segments of one packed row of `T` tokens, on `device`.

    It travels through a model as `handle`, a tensor with a number, so that compiled code sees the same kind of argument
    at each step; `Layout.of` finds it again. `calls` counts the attention layers that have read it, and `watch` is asked
    each time whether memory still holds. Attention weights are `kept` for the backward while they take no more than `room`.
    """

    def __init__(
        self, segments: Sequence[Segment], device: torch.device | str = "cpu", watch: Watch | None = None, fill: int = 0
    ) -> None:
        """fill: so many tokens at the end are nobody's; they are given position 0, which every model has."""
        super().__init__()
        self.segments, self.device, self.watch = tuple(segments), torch.device(device), watch
        self.length = sum(s.length for s in segments)
        self.calls, self.room, self.fill = 0, 0, fill
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

    def keep(self, heads: Heads, window: int, itemsize: int) -> tuple[int, list[Tensor] | None]:
        """A list for the attention weights of one call, and the number under which `kept` has it; 0 and None without room."""
        size = heads.q * itemsize * self.blocks(window).scores
        if size > self.room:
            return 0, None
        self.room -= size
        number = next(_numbers)
        return number, self.kept.setdefault(number, [])

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,): the place of each token in its examples."""
        places = [np.arange(s.offset, s.offset + s.length) for s in self.segments]
        found = np.concatenate(places)
        found[self.length - self.fill :] = 0
        return torch.from_numpy(found).to(self.device)

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

    def blocks(self, window: int = 0) -> Blocks:
        return self.once(("blocks", window), lambda: Blocks(self.segments, window, self.device))


def _last(path: Runs, n: int) -> Runs:
    """The last `n` tokens of `path`, or all where it has no more."""
    found: list[tuple[int, int]] = []
    for start, length in reversed(path):
        taken = min(length, n)
        if taken:
            found.insert(0, (start + length - taken, taken))
        n -= taken
    return tuple(found)


def _joined(path: Runs, run: tuple[int, int]) -> Runs:
    """`path` with `run` behind it; as one where the two lie side by side."""
    if path and sum(path[-1]) == run[0]:
        return (*path[:-1], (path[-1][0], path[-1][1] + run[1]))
    return (*path, run)

"""A step's examples as packs: end to end in one row, and what they begin with in common only once.

Examples that begin with the same tokens form a tree. Its runs of tokens are `Segment`s; a row holds them depth first, so a
token sees exactly those before it in the row whose subtree it lies in: `j <= i < end[j]`. A supervised token that several
examples share is computed once and counts once for each of them. What follows the last token that predicts a supervised one
is seen by nothing that counts, and left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trimtab.data.encode import Example

SHARE = 32  # tokens that a shared run must save: a segment of its own costs about as much as computing these


@dataclass(frozen=True)
class Segment:
    """A run of tokens that the same examples have in common, and all that follows from one place."""

    start: int  # of its first token in the row
    length: int
    parent: int  # index of the segment it follows, -1: none
    offset: int  # position of its first token in its examples


@dataclass(frozen=True)
class Pack:
    """Examples laid out as one row of `T` tokens, with the losses to be taken from it.

    Pair `p` says: the hidden state at `kept[at[p]]` predicts token `targets[p]`. Supervised token `s` of all the examples'
    is the pair `pair[s]` of example `owner[s]`; several examples may have one pair.
    """

    input_ids: np.ndarray  # (T,) int64
    segments: tuple[Segment, ...]  # depth first
    kept: np.ndarray  # (K,) int64, ascending: the positions that predict a supervised token
    at: np.ndarray  # (P,) int64
    targets: np.ndarray  # (P,) int64
    pair: np.ndarray  # (S,) int64
    owner: np.ndarray  # (S,) int64
    members: tuple[int, ...]  # which of the step's examples these are, in the pack's order
    tokens: int  # the sum of their lengths, with what was left out

    @property
    def weights(self) -> np.ndarray:
        """(P,) float32: for how many examples each pair counts."""
        return np.bincount(self.pair, minlength=len(self.at)).astype(np.float32)

    @property
    def supervised(self) -> int:
        """Supervised tokens, each counted for every example that has it."""
        return len(self.pair)

    @property
    def position_ids(self) -> np.ndarray:
        """(T,): the place of each token in its examples."""
        return np.concatenate([np.arange(s.offset, s.offset + s.length) for s in self.segments])


def ends(segments: Sequence[Segment]) -> np.ndarray:
    """(T,): where the subtree of each token's segment ends in the row. Token i sees j where j <= i < end[j]."""
    last = [s.start + s.length for s in segments]
    for i in reversed(range(len(segments))):
        if segments[i].parent >= 0:
            last[segments[i].parent] = max(last[segments[i].parent], last[i])
    return np.repeat(last, [s.length for s in segments])


def packs(examples: Sequence[Example], budget: int, *, share: bool = True) -> list[Pack]:
    """All examples in as few packs of at most `budget` tokens as filling them in turn needs, of like size.

    No example is left out. A pack is larger than the budget only where a single example is.
    """
    rows = [_read(e) for e in examples]
    if share:
        order, common = _sorted(rows)
        size = lambda a, b: sum(last - first for _, first, last, _ in _tree(order[a:b], common[a:b], rows))  # noqa: E731
    else:
        order, until = list(range(len(rows))), np.cumsum([0, *map(len, rows)]).tolist()
        size = lambda a, b: until[b] - until[a]  # noqa: E731
    parts = _filled(len(rows), size, budget, budget)
    if len(parts) > 1:
        even = _filled(len(rows), size, budget, -(-sum(size(*part) for part in parts) // len(parts)))
        parts = even if len(even) == len(parts) else parts
    return [pack(examples, order[a:b], share=share) for a, b in parts]


def _filled(n: int, size: Callable[[int, int], int], most: int, enough: int) -> list[tuple[int, int]]:
    """Neighbours a..b of `n` examples until they have `enough` tokens, or one more were over `most`."""
    found, a = [], 0
    while a < n:
        b = min(n, a + 1 + bisect_left(range(a + 1, n), enough, key=lambda b: size(a, b)))
        while b > a + 1 and size(a, b) > most:  # not quite monotone: one example more may make a shared run pay
            b -= 1
        found.append((a, b))
        a = b
    return found


def pack(
    examples: Sequence[Example], members: Sequence[int] | None = None, *, share: bool = True, whole: bool = False
) -> Pack:
    """These `members` of a step's examples (all of them) as one row. `share=False`: end to end, nothing in common.
    `whole`: with what nobody looks at."""
    members = range(len(examples)) if members is None else members
    examples = [examples[i] for i in members]
    rows = [_read(e, whole) for e in examples]
    found: list[tuple[Segment, np.ndarray]] = []
    where: list[list[np.ndarray]] = [[] for _ in rows]  # the positions of each example's tokens in the row
    length = 0
    for sharers, first, last, parent in _tree(*_sorted(rows), rows) if share else _apart(rows):
        found.append((Segment(length, last - first, parent, first), rows[sharers[0]][first:last]))
        for i in sharers:
            where[i].append(np.arange(length, length + last - first))
        length += last - first
    places = [np.concatenate(runs) for runs in where]
    ids = np.concatenate([run for _, run in found])
    tokens = sum(len(e.input_ids) for e in examples)
    return Pack(ids, tuple(s for s, _ in found), *_pairs(examples, places), tuple(members), tokens)


def _predicting(example: Example) -> np.ndarray:
    """The positions that predict a supervised token, ascending. Nothing predicts the first token of an example."""
    return np.flatnonzero(np.asarray(example.supervised, dtype=bool)[1:])


def _read(example: Example, whole: bool = False) -> np.ndarray:
    """The tokens that must go through the model: all up to the last that predicts a supervised one, the first in any case."""
    last = len(example.input_ids) if whole else [0, *_predicting(example)[-1:]][-1]
    return np.asarray(example.input_ids[: last + 1], dtype=np.int64)


def _pairs(
    examples: Sequence[Example], places: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Who predicts what, and for whom."""
    wanted = [_predicting(e) for e in examples]
    source = np.concatenate([place[w] for place, w in zip(places, wanted, strict=True)])
    target = np.concatenate([np.asarray(e.input_ids, dtype=np.int64)[w + 1] for e, w in zip(examples, wanted, strict=True)])
    width = int(target.max(initial=0)) + 1
    pairs, pair = np.unique(source * width + target, return_inverse=True)
    kept, at = np.unique(pairs // width, return_inverse=True)
    return kept, at, pairs % width, pair, np.repeat(np.arange(len(wanted)), [len(w) for w in wanted])


Run = tuple[list[int], int, int, int]  # the examples that have it, its first and last position in them, its parent


def _apart(rows: list[np.ndarray]) -> Iterator[Run]:
    yield from (([i], 0, len(row), -1) for i, row in enumerate(rows))


def _sorted(rows: list[np.ndarray]) -> tuple[list[int], list[int]]:
    """The rows in the order of their ids, and how many tokens each has in common with the one before it."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    return order, [0, *(_common(rows[a], rows[b]) for a, b in pairwise(order))]


def _tree(order: list[int], common: list[int], rows: list[np.ndarray]) -> Iterator[Run]:
    """Depth first: the runs of a tree over rows in `_sorted` order in which each shared run saves at least `SHARE` tokens."""
    made = 0
    waiting = [(0, len(order), 0, -1)]  # rows low..high of the order, one tree up to `first`, which ends in `parent`
    while waiting:
        low, high, first, parent = waiting.pop()
        members = order[low:high]
        shared = min(common[low + 1 : high], default=len(rows[order[low]]))
        if shared > first and (len(members) == 1 or (len(members) - 1) * (shared - first) >= SHARE):
            yield members, first, shared, parent
            first, parent, made = shared, made, made + 1
        if len(members) > 1:
            cuts = [low, *(k for k in range(low + 1, high) if common[k] == shared), high]
            waiting += reversed([(a, b, first, parent) for a, b in pairwise(cuts)])


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n

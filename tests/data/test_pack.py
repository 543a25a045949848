"""Packs against plain loops over their examples: every token, every pair, every weight."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data import Example
from trimtab.data.pack import SHARE, Pack, Segment, ends, pack, packs

LONG = list(range(100, 100 + SHARE))  # a run that pays as soon as two examples have it


def example(ids: list[int], supervised: list[bool] | None = None, line: int = 1) -> Example:
    return Example(ids, [True] * len(ids) if supervised is None else supervised, "rows.jsonl", line)


END = 1000  # predicted by the last token of a row, and so not in it


def examples(*rows: list[int]) -> list[Example]:
    return [example([*ids, END], line=i + 1) for i, ids in enumerate(rows)]


def needed(e: Example) -> list[int]:
    """Its tokens up to the last that predicts a supervised one."""
    ids = list(e.input_ids)
    for t in range(len(ids) - 1, 0, -1):
        if e.supervised[t]:
            return ids[:t]
    return ids[:1]


def saved(p: Pack, every: list[Example]) -> int:
    """Tokens that are computed once less than they are needed."""
    return sum(len(needed(every[i])) for i in p.members) - len(p.input_ids)


def visible(p: Pack, i: int) -> list[int]:
    """The positions of the row that token i sees: the rule that attention follows."""
    end = ends(p.segments)
    return [j for j in range(len(p.input_ids)) if j <= i < end[j]]


def paths(p: Pack) -> list[list[int]]:
    """For each segment the positions of the row from the root to its end, by its parents alone."""
    found: list[list[int]] = []
    for s in p.segments:
        before = found[s.parent] if s.parent >= 0 else []
        found.append([*before, *range(s.start, s.start + s.length)])
    return found


def holds(p: Pack, every: list[Example]) -> None:
    """All that a pack says is true of the examples it has taken."""
    mine = [every[i] for i in p.members]
    _row(p)
    whole = {tuple(p.input_ids[path].tolist()) for path in paths(p)}
    assert {tuple(needed(e)) for e in mine} <= whole
    assert p.tokens == sum(len(e.input_ids) for e in mine)
    assert saved(p, every) >= 0
    # one pair for each supervised token but the first, in order, owned by its example
    wanted = [(k, e.input_ids[: t + 1]) for k, e in enumerate(mine) for t in range(1, len(e.input_ids)) if e.supervised[t]]
    assert p.supervised == len(wanted) == p.weights.sum()
    assert p.owner.tolist() == [k for k, _ in wanted]
    for (_, prefix), pair in zip(wanted, p.pair, strict=True):
        at = int(p.kept[p.at[pair]])
        assert [*p.input_ids[visible(p, at)].tolist(), int(p.targets[pair])] == prefix
        assert p.position_ids[at] == len(prefix) - 2
    # nothing stands twice, nothing is kept that predicts nothing
    assert np.all(np.diff(p.kept) > 0) and set(p.at) == set(range(len(p.kept)))
    assert len({(a, t) for a, t in zip(p.at, p.targets, strict=True)}) == len(p.targets)
    assert np.all(np.diff(p.at) >= 0), "pairs are in the order of the row"
    assert p.weights.tolist() == [p.pair.tolist().count(k) for k in range(len(p.targets))]


def _row(p: Pack) -> None:
    """Segments lie end to end, depth first, each behind the last token of its parent's."""
    at = 0
    for i, s in enumerate(p.segments):
        assert s.start == at and s.length > 0 and -1 <= s.parent < i
        at += s.length
        if s.parent < 0:
            assert s.offset == 0
            continue
        above = p.segments[s.parent]
        assert s.offset == above.offset + above.length
        line = [i - 1]  # depth first: the parent is the segment before, or one of those that it follows
        while line[-1] >= 0:
            line.append(p.segments[line[-1]].parent)
        assert s.parent in line
    assert at == len(p.input_ids) == len(p.position_ids)


def test_one_example_is_one_segment() -> None:
    p = pack([example([5, 6, 7], [False, True, True])])
    assert p.segments == (Segment(0, 2, -1, 0),)
    assert p.kept.tolist() == [0, 1] and p.targets.tolist() == [6, 7] and p.owner.tolist() == [0, 0]
    holds(p, [example([5, 6, 7], [False, True, True])])


def test_what_predicts_nothing_is_left_out() -> None:
    """The end of a turn and the line break behind it, a question without its answer, a row of no loss but its first token."""
    rows = [
        example([*LONG, 1, 2, 3], [False] * SHARE + [True, True, False]),  # 2 is predicted, and predicts nothing
        example([*LONG, 1, 2, 4, 5, 6], [False] * SHARE + [True, False, True, False, False]),
        example([7, 8, 9], [True, False, False]),
    ]
    p = pack(rows)
    assert p.input_ids.tolist() == [7, *LONG, 1, 2]  # all of the first is the beginning of the second
    assert p.tokens == SHARE + 3 + SHARE + 5 + 3 and p.supervised == 4
    holds(p, rows)


def test_a_common_beginning_is_one_segment() -> None:
    rows = examples([*LONG, 1, 2], [*LONG, 3])
    p = pack(rows)
    assert p.segments == (Segment(0, SHARE, -1, 0), Segment(SHARE, 2, 0, SHARE), Segment(SHARE + 2, 1, 0, SHARE))
    assert saved(p, rows) == SHARE
    assert ends(p.segments)[[0, SHARE - 1, SHARE, SHARE + 2]].tolist() == [SHARE + 3, SHARE + 3, SHARE + 2, SHARE + 3]
    holds(p, rows)


@pytest.mark.parametrize(("length", "sharers", "shared"), [
    (SHARE - 1, 2, False), (SHARE, 2, True), (SHARE // 2, 2, False), (SHARE // 2, 3, True), (1, SHARE, False),
    (1, SHARE + 1, True),
])  # fmt: skip
def test_a_run_is_shared_where_it_saves_enough(length: int, sharers: int, shared: bool) -> None:
    rows = examples(*([*LONG[:length], k] for k in range(sharers)))
    p = pack(rows)
    assert saved(p, rows) == (length * (sharers - 1) if shared else 0)
    holds(p, rows)


def test_several_levels() -> None:
    a, b = LONG, [9] * SHARE
    rows = examples([*a, *b, 1], [*a, *b, 2], [*a, 3, 4], [*b, 5], [*a, *b, 1, *b, 7], [*a, *b, 1, *b, 8])
    p = pack(rows)
    depth = [0] * len(p.segments)
    for i, s in enumerate(p.segments):
        depth[i] = 0 if s.parent < 0 else depth[s.parent] + 1
    assert max(depth) == 3
    # a, b behind it, then 1 | 1 b, 7 | 8 | 2; 3 4 behind a; b 5 by itself
    assert len(p.input_ids) == SHARE + SHARE + 1 + (1 + SHARE) + 1 + 1 + 1 + 2 + (SHARE + 1)
    holds(p, rows)


def test_identical_examples_are_computed_once_and_count_each() -> None:
    rows = examples(*[[*LONG, 1]] * 3)
    p = pack(rows)
    assert len(p.segments) == 1 and len(p.input_ids) == SHARE + 1
    assert p.weights.tolist() == [3] * (SHARE + 1) and p.supervised == 3 * (SHARE + 1)
    holds(p, rows)
    short = examples([1, 2, 3], [1, 2, 3])  # too short to pay
    assert len(pack(short).input_ids) == 6
    holds(pack(short), short)


def test_examples_that_are_prefixes_of_one_another() -> None:
    rows = examples([*LONG, 1, 2, 3], LONG, [*LONG, 1, *LONG], [*LONG, 1])
    p = pack(rows)
    assert saved(p, rows) > 0
    holds(p, rows)


def test_a_shared_run_that_carries_loss_in_some_examples_only() -> None:
    n = SHARE + 1
    rows = [
        example([*LONG, 1], [True] * n),
        example([*LONG, 2], [False] * SHARE + [True]),
        example([*LONG, 3], [k % 2 == 0 for k in range(n)]),
    ]
    p = pack(rows)
    assert p.weights[: SHARE - 1].tolist() == [1 + (t % 2 == 0) for t in range(1, SHARE)]
    assert [int((p.owner == k).sum()) for k in range(3)] == [SHARE, 1, SHARE // 2]
    # the last shared token predicts another one for each example: one place, three pairs
    assert sorted(p.targets[p.kept[p.at] == SHARE - 1].tolist()) == [1, 2, 3]
    holds(p, rows)


def test_no_loss_at_all() -> None:
    rows = [example([*LONG, 1], [False] * (SHARE + 1)), example([7], [True])]  # nothing predicts a first token
    p = pack(rows)
    assert p.supervised == len(p.kept) == len(p.targets) == len(p.weights) == 0
    holds(p, rows)


def test_nothing_in_common() -> None:
    rows = examples([*LONG, 1], [*LONG, 2], [*LONG, 1])
    p = pack(rows, share=False)
    assert [s.parent for s in p.segments] == [-1] * 3
    assert p.input_ids.tolist() == [i for e in rows for i in e.input_ids if i != END]
    holds(p, rows)


def test_members_in_any_order() -> None:
    rows = examples([*LONG, 1], [*LONG, 2], [5, 6], [*LONG, 2])
    p = pack(rows, [3, 2, 0])
    assert p.members == (3, 2, 0)
    holds(p, rows)


# ---- the budget


def ragged(n: int, seed: int, longest: int = 60) -> list[Example]:
    """Examples over two letters, of which many begin alike."""
    draw = random.Random(seed)
    stems = [[draw.randint(0, 1) for _ in range(longest)] for _ in range(3)]
    rows = []
    for _ in range(n):
        stem = draw.choice(stems)[: draw.randint(0, longest)]
        rows.append(stem + [draw.randint(0, 1) for _ in range(draw.randint(1, longest))])
    return examples(*rows)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [40, 100, 333, 2000, 10**6])
def test_no_pack_is_over_budget_but_a_single_long_example(budget: int, share: bool) -> None:
    for seed in range(8):
        rows = ragged(30, seed)
        found = packs(rows, budget, share=share)
        assert sorted(i for p in found for i in p.members) == list(range(30))
        for p in found:
            assert len(p.input_ids) <= budget or len(p.members) == 1
        assert budget < 10**6 or len(found) == 1
    for p in found:
        holds(p, rows)


def test_packs_are_of_like_size() -> None:
    rows = examples(*([k] * 100 for k in range(16)))
    assert [len(p.input_ids) for p in packs(rows, 500)] == [400] * 4  # and not 500, 500, 500, 100
    shared = examples(*([*LONG * 4, *[k] * 20] for k in range(16)))  # 128 tokens in common, 20 of their own
    sizes = [len(p.input_ids) for p in packs(shared, 300)]
    assert sizes == [128 + 8 * 20] * 2


def test_small_gains_that_are_not_taken_are_not_counted_on() -> None:
    """Pairs that have just too little in common to share it: a budget that took it for saved would be far exceeded."""
    rows = examples(*([k // 2] * (SHARE - 1) + [k] * 9 for k in range(50, 90)))
    found = packs(rows, 200)
    assert all(len(p.input_ids) == 200 and saved(p, rows) == 0 for p in found) and len(found) == 8


def test_a_step_of_nothing() -> None:
    assert packs([], 100) == []


small = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=50),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(small, st.integers(10, 200), st.booleans(), st.lists(st.integers(0, 7), max_size=4))
def test_any_examples(drawn: list[list[tuple[int, bool]]], budget: int, share: bool, again: list[int]) -> None:
    stem = [0] * 40
    rows = []
    for k, row in enumerate([*drawn, *(drawn[i % len(drawn)] for i in again)]):
        head = stem if k % 2 else []
        rows.append(example([*head, *(t for t, _ in row)], [k % 3 == 0] * len(head) + [s for _, s in row], k))
    found = packs(rows, budget, share=share)
    assert sorted(i for p in found for i in p.members) == list(range(len(rows)))
    for p in found:
        assert len(p.input_ids) <= budget or len(p.members) == 1
        holds(p, rows)
    assert sum(p.supervised for p in found) == sum(sum(e.supervised[1:]) for e in rows)

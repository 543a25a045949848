"""Attention over layouts against one example at a time, by torch's own scaled dot product attention."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data.pack import Segment
from trimtab.engine import attention, layout
from trimtab.engine.attention import Rule, grouped, grouped_backward, packed_attention, plain
from trimtab.engine.flex import flex
from trimtab.engine.layout import Layout
from trimtab.errors import NotSupported

HEADS, KEYS, D, E = 4, 2, 8, 6  # query heads, heads of keys and values, width of keys, of values

# (length, parent) of each segment, depth first
TREES = {
    "one": [(7, -1)],
    "one token": [(1, -1)],
    "apart": [(5, -1), (40, -1), (33, -1), (1, -1), (32, -1)],
    "shared": [(70, -1), (5, 0), (33, 0), (1, 0), (6, 0)],
    "deep": [(3, -1), (4, 0), (2, 1), (5, 2), (1, 2), (36, 1), (9, 0), (50, -1), (2, 7), (2, 7), (64, 9)],
}
RULES = {
    "plain": Rule(0.3),
    "softcap": Rule(2.0, softcap=1.5),
    "window": Rule(0.3, window=4),  # shorter than most segments, and reaches back over the edge of a prefix
    "long window": Rule(0.3, window=45),
    "all": Rule(1.0, softcap=2.0, window=9),
}


def laid(tree: str) -> Layout:
    found: list[Segment] = []
    start = 0
    for length, parent in TREES[tree]:
        offset = found[parent].offset + found[parent].length if parent >= 0 else 0
        found.append(Segment(start, length, parent, offset))
        start += length
    return Layout(found)


def tensors(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, the gradient of the result, and sinks."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(HEADS, length, D), (KEYS, length, D), (KEYS, length, E), (HEADS, length, E), (HEADS,)]
    return tuple(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)


def alone(q: Tensor, k: Tensor, v: Tensor, where: Layout, rule: Rule) -> Tensor:
    """Each example by itself: the tokens from a root to a leaf, in order. Soft caps and sinks go into torch's additive mask."""
    out = q.new_zeros(HEADS, where.length, E)
    paths: list[list[int]] = []
    for s in where.segments:
        before = paths[s.parent] if s.parent >= 0 else []
        paths.append([*before, *range(s.start, s.start + s.length)])
        at = torch.tensor(paths[-1])
        n = len(at)
        qs, ks, vs = q[:, at], k[:, at].repeat_interleave(HEADS // KEYS, 0), v[:, at].repeat_interleave(HEADS // KEYS, 0)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (distance < 0) | (distance >= rule.window) if rule.window else distance < 0
        mask = torch.zeros(HEADS, n, n, dtype=q.dtype)
        if rule.softcap:
            scores = rule.scaling * qs @ ks.mT
            mask = rule.softcap * torch.tanh(scores / rule.softcap) - scores
        mask = mask.masked_fill(hidden, -torch.inf)
        if rule.sinks is not None:  # a key of zeros, whose score is its mask, and whose value is nothing
            mask = torch.cat([mask, rule.sinks[:, None, None].expand(-1, n, 1)], 2)
            ks, vs = (torch.cat([x, x.new_zeros(HEADS, 1, x.shape[2])], 1) for x in (ks, vs))
        done = F.scaled_dot_product_attention(qs[None], ks[None], vs[None], attn_mask=mask[None], scale=rule.scaling)[0]
        own = torch.arange(s.start, s.start + s.length)
        out = out.index_copy(1, own, done[:, n - s.length :])
    return out


def gradients(form: Any, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = form(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def with_sinks(rule: Rule, sinks: Tensor, wanted: bool) -> Rule:
    return replace(rule, sinks=sinks) if wanted else rule


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tree", TREES)
def test_the_definition_is_every_example_alone(tree: str, rule: str, sinks: bool) -> None:
    where = laid(tree)
    q, k, v, dy, s = tensors(where.length)
    how = with_sinks(RULES[rule], s, sinks)
    wanted = gradients(lambda *x: alone(*x, where, how), q, k, v, dy)
    close(gradients(lambda *x: plain(*x, where, how), q, k, v, dy), wanted, 1e-12)


@pytest.mark.parametrize("piece", [8, 256])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_grouped_and_the_operator_equal_the_definition(
    tree: str, rule: str, sinks: bool, piece: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "PIECE", piece)
    if piece == 8:
        monkeypatch.setattr(layout, "LARGEST", 600)
        monkeypatch.setattr(attention, "ALONE", 0)
    where = laid(tree)
    q, k, v, dy, s = tensors(where.length, dtype)
    how = with_sinks(RULES[rule], s, sinks)
    wanted = gradients(lambda *x: plain(*x, where, how), q, k, v, dy)
    close([grouped(q, k, v, where, how), *grouped_backward(dy, q, k, v, where, how)], wanted, tolerance)

    def operator(*x: Tensor) -> Tensor:
        y, number = packed_attention(*(t[None] for t in x), where.handle, how.scaling, how.softcap, how.window, how.sinks)
        assert y.is_contiguous() and list(where.kept) == [int(number)] * (where.room > 0 and not how.softcap)
        return y[0].transpose(0, 1)

    close(gradients(operator, q, k, v, dy), wanted, tolerance)
    where.room = 1 << 30
    close(gradients(operator, q, k, v, dy), wanted, tolerance)
    assert where.calls == 2 and not where.kept


def test_weights_are_kept_while_there_is_room_and_taken_once() -> None:
    where = laid("shared")
    q, k, v, dy, _ = tensors(where.length)
    leaves = [x[None].requires_grad_() for x in (q, k, v)]
    size = HEADS * 8 * sum(b.count * b.length * b.seen for b in where.blocks())
    where.room = 2 * size + 1
    calls = [packed_attention(*leaves, where.handle, 0.3, 0.0, 0, None) for _ in range(3)]
    assert [bool(number) for _, number in calls] == [True, True, False] and where.room == 1
    assert sum(p.nbytes for p in where.kept[int(calls[0][1])]) == size
    wanted = gradients(lambda *x: plain(*x, where, Rule(0.3)), q, k, v, dy)[1:]
    for left, (y, _) in zip((1, 0, 0), calls, strict=True):
        for again in (True, False):  # a second backward of the same call finds none, and computes them
            found = torch.autograd.grad(y, leaves, dy.transpose(0, 1)[None], retain_graph=again)
            close([x[0] for x in found], wanted, 1e-12)
        assert len(where.kept) == left


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_that_go_alone_are_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ALONE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in range(1, 8):
            a, b = torch.randn(n, 6, 5, dtype=torch.float64), torch.randn(n, 7, 5, dtype=torch.float64)
            close([attention._each(a, b.mT), attention._each(a.mT, a)], [a @ b.mT, a.mT @ a], 1e-14)
    finally:
        torch.set_num_threads(before)


def test_blocks_are_small_and_see_no_further_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Layout([Segment(0, 4096, -1, 0)])
    assert {(b.count, b.known) for b in where.blocks()} == {(1, 128 * i) for i in range(32)}
    near = [b for b in where.blocks(256) if b.known == 255]
    assert sum(b.count for b in near) == 30 and len(near) == 2  # all but the first two pieces
    assert all(b.count * b.length * b.seen <= 1.1 * layout.LARGEST and b.seen <= 256 + 128 for b in where.blocks(256))


@pytest.mark.parametrize("heads", [1, 2])
def test_as_many_heads_of_keys_as_of_queries(heads: int) -> None:
    where = laid("deep")
    draw = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, heads, where.length, D, generator=draw, dtype=torch.float64)
    wanted = gradients(lambda *x: plain(*x, where, Rule(0.3)), q, k, v, dy)
    close([grouped(q, k, v, where, Rule(0.3)), *grouped_backward(dy, q, k, v, where, Rule(0.3))], wanted, 1e-12)


def test_a_token_outside_of_an_example_changes_nothing_in_it() -> None:
    where = laid("shared")
    q, k, v, *_ = tensors(where.length)
    before = grouped(q, k, v, where, Rule(0.3))
    k, v = k.clone(), v.clone()
    k[:, 70:75], v[:, 70:75] = 1e6, -1e6  # the first example's own tokens
    after = grouped(q, k, v, where, Rule(0.3))
    assert torch.equal(before[:, :70], after[:, :70]) and torch.equal(before[:, 75:], after[:, 75:])
    assert not torch.equal(before[:, 70:75], after[:, 70:75])


def test_bfloat16_is_the_definition_to_its_rounding() -> None:
    where = laid("deep")
    q, k, v, dy, s = tensors(where.length)
    how = Rule(0.3, sinks=s)
    wanted = gradients(lambda *x: plain(*x, where, how), q, k, v, dy)
    low = [x.bfloat16() for x in (q, k, v, dy)]
    found = [grouped(*low[:3], where, how), *grouped_backward(low[3], *low[:3], where, how)]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).square().mean().sqrt() < 0.02 * b.std()


@pytest.mark.parametrize("sinks", [False, True])
def test_torch_accepts_the_operators(sinks: bool) -> None:
    """Schema, fake results, autograd registration, and a trace with dynamic shapes."""
    where = laid("shared")
    q, k, v, dy, s = tensors(where.length)
    q, k, v = (x[None].requires_grad_() for x in (q, k, v))
    numbers = (where.handle, 0.3, 1.5, 7, s if sinks else None)
    torch.library.opcheck(packed_attention, (q, k, v, *numbers))
    dy = dy.transpose(0, 1)[None].contiguous()
    found = attention.packed_attention_backward
    torch.library.opcheck(found, (dy, torch.tensor(0), *(x.detach() for x in (q, k, v)), *numbers))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tree", TREES)
def test_flex_equals_the_definition(tree: str, rule: str, sinks: bool) -> None:
    where = laid(tree)
    q, k, v, _, s = tensors(where.length, torch.float32)
    how = with_sinks(RULES[rule], s, sinks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: flex attention is slow without its compiler
        found = flex(q[None], k[None], v[None], where.handle, how.scaling, how.softcap, how.window, how.sinks)
    close([found[0].transpose(0, 1)], [plain(q, k, v, where, how)], 1e-5)
    assert where.calls == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention is compiled for CUDA devices")
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tree", TREES)
def test_compiled_flex_equals_the_definition(tree: str, rule: str, sinks: bool) -> None:
    here = Layout(laid(tree).segments, "cuda")
    shapes = [(HEADS, here.length, 64), (KEYS, here.length, 64), (KEYS, here.length, 64), (HEADS, here.length, 64)]
    q, k, v, dy = (torch.randn(s, device="cuda") for s in shapes)
    how = with_sinks(RULES[rule], torch.randn(HEADS, device="cuda"), sinks)
    wanted = gradients(lambda *x: plain(*x, here, how), q, k, v, dy)
    numbers = (here.handle, how.scaling, how.softcap, how.window, how.sinks)
    found = gradients(lambda *x: flex(*(t[None] for t in x), *numbers)[0].transpose(0, 1), q, k, v, dy)
    close(found, wanted, 1e-2)  # products in TF32


def called(where: Layout, **over: Any) -> Tensor:
    """As an attention layer of transformers calls it."""
    q, k, v, *_ = (x[None] for x in tensors(where.length))
    given: dict[str, Any] = {"attention_mask": None, "scaling": 0.3, "layout": where.handle}
    return attention.laid_out(nn.Module(), q, k, v, **given | over)[0][0].transpose(0, 1)


@pytest.mark.parametrize("said", [{"attention_mask": 4}, {"sliding_window": 4}, {"attention_mask": 4, "sliding_window": 4}])
def test_a_window_may_be_said_by_the_mask_or_the_layer(said: dict[str, int]) -> None:
    where = laid("deep")
    wanted = plain(*tensors(where.length)[:3], where, Rule(0.3, window=4))
    close([called(where, **said)], [wanted], 1e-12)


def test_without_a_scale_it_is_that_of_the_paper() -> None:
    where = laid("apart")
    close([called(where, scaling=None)], [plain(*tensors(where.length)[:3], where, Rule(D**-0.5))], 1e-12)


@pytest.mark.parametrize(("said", "why"), [
    ({"layout": None}, "does not reach"),
    ({"attention_mask": 4, "sliding_window": 5}, "a window of 4 tokens, its attention one of 5"),
    ({"attention_mask": torch.zeros(1)}, "a mask of its own"),
    ({"position_bias": 1}, "takes position_bias"),
    ({"is_causal": False}, "not causal"),
    ({"dropout": 0.1}, "drops out 0.1 of the weights"),
    ({"s_aux": torch.zeros(HEADS, requires_grad=True)}, "sinks of its attention are trained"),
])  # fmt: skip
def test_what_no_layout_can_say_is_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(NotSupported, match=why):
        called(laid("shared"), **said)


def test_a_layout_dies_with_its_last_holder() -> None:
    where = laid("shared")
    handle = where.handle
    assert Layout.of(handle) is where
    del where
    with pytest.raises(KeyError):
        Layout.of(handle)

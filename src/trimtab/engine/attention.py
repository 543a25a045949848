"""Attention over a packed row: each token sees those before it in its own examples, and no others.

    y_i = sum over visible j of softmax_j(s q_i . k_j) v_j

`plain` is the definition. `grouped` does the same for segments of like length together, without a (T, T) mask, and is what a
CPU runs; on a CUDA device it is flex attention. Registered with transformers under `NAME`, which no model is patched for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.engine.layout import Block, Heads, Layout
from trimtab.errors import NotSupported

NAME = "trimtab"
# what attention modules pass along that does not change the result, or that a layout replaces
ALONE = 1 << 21  # multiplications for each thread
KNOWN = {"position_ids", "use_cache", "cache", "past_key_values", "cache_position", "output_attentions", "output_hidden_states",
         "output_router_logits", "num_items_in_batch", "return_dict", "logits_to_keep", "is_causal"}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """How scores become weights: `scaling`, Gemma's `softcap` (0: none), a `window` of tokens (0: all), gpt-oss' sinks."""

    scaling: float
    softcap: float = 0.0
    window: int = 0
    sinks: Tensor | None = None  # (heads,): one more logit in each softmax, whose weight goes nowhere

    def capped(self, scores: Tensor) -> Tensor:
        return scores if not self.softcap else self.softcap * torch.tanh(scores / self.softcap)

    def slope(self, capped: Tensor) -> Tensor | float:
        """The derivative of `capped`, at its values."""
        return 1.0 if not self.softcap else 1 - (capped / self.softcap) ** 2


def plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """q (H, T, d), k (K, T, d), v (K, T, e), H a multiple of K -> (H, T, e)."""
    per = len(q) // len(k)
    k, v = k.repeat_interleave(per, 0), v.repeat_interleave(per, 0)
    scores = rule.capped(rule.scaling * q @ k.transpose(1, 2))  # (H, T, T)
    scores = scores.masked_fill(~layout.visible(rule.window), -torch.inf)
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks[:, None, None].to(scores).expand(*scores.shape[:2], 1)], 2)
    return scores.softmax(2)[..., : layout.length] @ v


# ---- grouped


def _rows(x: Tensor) -> Tensor:
    """(heads, T, d) as rows (T heads, d): how projections leave them in memory, so that nothing is copied."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def _each(a: Tensor, b: Tensor) -> Tensor:
    """a (n, p, k) @ b (n, k, r). In float32 torch gives each thread whole matrices: those that would leave some threads without
    one go by themselves, where they are large enough for all threads at once."""
    threads = torch.get_num_threads()
    alone = len(a) % threads
    if not alone or a.is_cuda or a.dtype.itemsize < 4 or a[0].numel() * b.shape[2] < ALONE * threads:
        return a @ b
    out, together = a.new_empty(len(a), a.shape[1], b.shape[2]), len(a) - alone
    if together:
        torch.bmm(a[:together], b[:together], out=out[:together])
    for i in range(together, len(a)):
        torch.mm(a[i], b[i], out=out[i])
    return out


class _Part:
    """One block at work. For each of its n segments: queries q (K n, g L, d), g heads for one of keys and values, scaled;
    keys and values k, v (K n, S, .) of the tokens that the segment follows and of its own."""

    def __init__(self, block: Block, rule: Rule, heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.block, self.rule, self.heads = block, rule, heads
        self.q = self.queries(q) * rule.scaling
        keys = block.keys_of(heads)
        self.k, self.v = (x.index_select(0, keys).view(-1, block.seen, x.shape[-1]) for x in (k, v))

    def queries(self, x: Tensor) -> Tensor:
        """The block's own of the rows x (T H, .): (K n, g L, .)."""
        found = x.index_select(0, self.block.asks_of(self.heads))
        return found.view(self.heads.kv * self.block.count, -1, x.shape[-1])

    def weights(self) -> tuple[Tensor, Tensor]:
        """Scores (K n, g L, S), under a soft cap alone, and what they become; with sinks theirs is the last weight."""
        rule, heads, bias = self.rule, self.heads, self.block.bias(self.heads.per, self.q.dtype)
        scores = rule.capped(_each(self.q, self.k.mT))
        masked = scores.clone() if rule.softcap else scores
        masked[..., -bias.shape[1] :] += bias
        if rule.sinks is not None:
            sinks = rule.sinks.to(scores.dtype).view(heads.kv, 1, heads.per, 1)
            sinks = sinks.expand(-1, self.block.count, -1, self.block.length).reshape(*scores.shape[:2], 1)
            masked = torch.cat([masked, sinks], 2)
        return scores, torch.softmax(masked, 2, out=masked)  # in place: memory is what attention waits for

    def forward(self, kept: list[Tensor] | None) -> Tensor:
        """(K n, g L, e). The weights are put into `kept`, if that is given."""
        p = self.weights()[1]
        if kept is not None:
            kept.append(p)
        return _each(p[..., : self.block.seen], self.v)

    def backward(self, dy: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """For dy (K n, g L, e) and the weights, if they were kept: dq (K n, g L, d), and dk, dv (K n, S, .)."""
        scores, p = self.weights() if p is None else (p, p)  # scores are asked for under a soft cap alone: none are kept then
        dp = _each(dy, self.v.mT)
        if self.rule.sinks is not None:
            dp = torch.cat([dp, dp.new_zeros(*dp.shape[:2], 1)], 2)
        torch.ops.aten._softmax_backward_data(dp, p, 2, p.dtype, grad_input=dp)  # in place, too
        ds = dp[..., : self.block.seen]
        ds = ds * self.rule.slope(scores) if self.rule.softcap else ds
        return _each(ds, self.k) * self.rule.scaling, _each(ds.mT, self.q), _each(p[..., : self.block.seen].mT, dy)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in parts])


def grouped(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, kept: list[Tensor] | None = None
) -> Tensor:
    """As `plain`, block by block. `kept`, if given, is filled with what `grouped_backward` takes, so as not to do it again."""
    heads, rows, blocks = Heads(len(q), len(k)), [_rows(x) for x in (q, k, v)], layout.blocks(rule.window)
    out = _joined(_Part(b, rule, heads, *rows).forward(kept) for b in blocks)
    return out.index_select(0, blocks.place(heads)).view(layout.length, len(q), -1).transpose(0, 1)


def grouped_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Weights that were not kept are computed again, and no more than one block's held at a time."""
    heads, rows, dy = Heads(len(q), len(k)), [_rows(x) for x in (q, k, v)], _rows(dy)
    found, blocks = [], layout.blocks(rule.window)
    for block, p in zip(blocks, kept or [None] * len(blocks.blocks), strict=True):
        part = _Part(block, rule, heads, *rows)
        found.append(part.backward(part.queries(dy) * block.real(heads, dy.dtype), p))
    dq, dk, dv = (_joined(parts) for parts in zip(*found, strict=True))
    dq = dq.index_select(0, blocks.place(heads)).view(layout.length, len(q), -1)
    bags, starts = blocks.bags(heads)  # a token is a key of each segment that sees it: its gradients are added up
    dk, dv = (F.embedding_bag(bags, x, starts, mode="sum").view(layout.length, len(k), -1) for x in (dk, dv))
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


@torch.library.custom_op("trimtab::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scaling: float, softcap: float, window: int, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (1, H, T, d), k, v (1, K, T, .) -> (1, T, H, e), by `grouped`, and the number under which the layout keeps the weights,
    or 0. One operator, so that compiled layers keep it whole."""
    layout, heads = Layout.of(handle).read(), Heads(q.shape[1], k.shape[1])
    number, kept = (0, None) if softcap else layout.keep(heads, window, q.element_size())
    with torch.autocast(q.device.type, enabled=False):  # it would raise the softmax to float32, here and not in the backward
        y = grouped(q[0], k[0], v[0], layout, Rule(scaling, softcap, window, sinks), kept)
    return y.transpose(0, 1)[None].contiguous(), torch.tensor(number)


@packed_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scaling: float, softcap: float, window: int, sinks: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("trimtab::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    dy: Tensor, number: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scaling: float, softcap: float, window: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout, rule = Layout.of(handle), Rule(scaling, softcap, window, sinks)
    with torch.autocast(q.device.type, enabled=False):
        kept = layout.kept.pop(int(number), None)
        dq, dk, dv = grouped_backward(dy[0].transpose(0, 1), q[0], k[0], v[0], layout, rule, kept)
    return dq[None], dk[None], dv[None]


@packed_attention_backward.register_fake
def _(dy: Tensor, number: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = (x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))  # as `_rows` lie
    return tuple(found)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, handle, *ctx.numbers, sinks = inputs
    ctx.save_for_backward(output[1], q, k, v, handle, *([] if sinks is None else [sinks]))


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    number, q, k, v, handle, *sinks = ctx.saved_tensors
    found = packed_attention_backward(dy, number, q, k, v, handle, *ctx.numbers, sinks[0] if sinks else None)
    return (*found, None, None, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_save)


# ---- as transformers calls it


def laid_out(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | int | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, d), key and value (1, K, T, .) -> (1, T, H, e). Raises `NotSupported` for what no layout can say.

    attention_mask: what `_mask` made, the window of this layer or None.
    """
    unknown = sorted(k for k, x in more.items() if x is not None and k not in KNOWN)
    if layout is None:
        raise NotSupported("the layout does not reach the attention layers of this model")
    if isinstance(attention_mask, Tensor) or unknown:
        raise NotSupported(f"its attention takes {', '.join(unknown) or 'a mask of its own'}")
    if attention_mask and sliding_window and attention_mask != sliding_window:
        raise NotSupported(f"its mask has a window of {attention_mask} tokens, its attention one of {sliding_window}")
    if more.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotSupported("its attention is not causal")
    if dropout:
        raise NotSupported(f"its attention drops out {dropout:g} of the weights in training")
    if s_aux is not None and s_aux.requires_grad:
        raise NotSupported("the sinks of its attention are trained")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # as torch's own attention does
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    window = attention_mask or sliding_window or 0
    form = _flex if query.is_cuda else packed_attention
    return form(query, key, value, layout, scaling, softcap or 0.0, window, s_aux)[0], None


def _flex(*args: Any) -> tuple[Tensor]:
    from trimtab.engine.flex import flex

    return (flex(*args),)


def _mask(*args: Any, config: Any = None, local_size: int | None = None, **more: Any) -> int | None:
    """In place of a mask, which the layout says: its window. Some models tell that to their mask alone."""
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise NotSupported(f"its attention is confined to chunks of {local_size} tokens")
    return local_size


ALL_ATTENTION_FUNCTIONS.register(NAME, laid_out)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """The model's attention reads layouts inside; forward and backward of a step both belong there."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


"""Attention over a packed row: each token sees those before it in its own examples, and no others.

    y_i = sum over visible j of softmax_j(s q_i . k_j) v_j

`plain` is the definition. `grouped` does the same for segments of like length together, without a (T, T) mask, and is what a
CPU runs; on a CUDA device it is flex attention. Registered with transformers under `NAME`, which no model is patched for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.engine.layout import Block, Layout
from trimtab.errors import NotSupported

NAME = "trimtab"
# what attention modules pass along that does not change the result, or that a layout replaces
KNOWN = {"position_ids", "use_cache", "cache", "past_key_values", "cache_position", "output_attentions", "output_hidden_states",
         "output_router_logits", "num_items_in_batch", "return_dict", "logits_to_keep", "is_causal"}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """How scores become weights: `scaling`, Gemma's `softcap` (0: none), a `window` of tokens (0: all), gpt-oss' sinks."""

    scaling: float
    softcap: float = 0.0
    window: int = 0
    sinks: Tensor | None = None  # (heads,): one more logit in each softmax, whose weight goes nowhere

    def scores(self, products: Tensor) -> Tensor:
        """Products q . k as scores. They are overwritten."""
        scores = products.mul_(self.scaling)
        return scores if not self.softcap else self.softcap * torch.tanh(scores / self.softcap)

    def slope(self, scores: Tensor) -> Tensor | float:
        """The derivative of `scores` after the product."""
        return self.scaling if not self.softcap else self.scaling * (1 - (scores / self.softcap) ** 2)

    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """Scores (K, H / K, ..., keys) normalised, but for `hidden` (bool) ones; with sinks theirs is the last weight."""
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            kv, per = scores.shape[:2]
            sinks = self.sinks.to(scores.dtype).view(kv, per, *[1] * (scores.dim() - 2))
            scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        return scores.softmax(-1)


def plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """q (H, T, d), k (K, T, d), v (K, T, e), H a multiple of K -> (H, T, e)."""
    heads, tokens, _ = q.shape
    q = q.view(len(k), -1, tokens, q.shape[-1])
    p = rule.weights(rule.scores(q @ k[:, None].transpose(-1, -2)), ~layout.visible(rule.window))
    return (p[..., :tokens] @ v[:, None]).reshape(heads, tokens, -1)


# ---- grouped


class _Part:
    """One block at work: its own q (K, H / K, n, L, d), k, v (K, 1, n, L, .), and kb, vb (K, P, .) of what it follows."""

    def __init__(self, block: Block, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.block, self.rule = block, rule
        self.q, self.k, self.v = (self.take(x, len(k)) for x in (q, k, v))
        self.kb, self.vb = (torch.cat([x[:, a : a + n] for a, n in block.before] or [x[:, :0]], 1) for x in (k, v))
        self.known = self.kb.shape[1]  # P

    def take(self, x: Tensor, kv: int) -> Tensor:
        rows = x.index_select(1, self.block.rows)
        return rows.view(kv, -1, self.block.count, self.block.length, x.shape[-1])

    def beside(self, x: Tensor, m: Tensor) -> Tensor:
        """x (K, H / K, n, L, a) times m (K, a, b), one product for all segments of the block together."""
        return (x.flatten(1, 3) @ m).view(*x.shape[:-1], -1)

    def against(self, own: Tensor, before: Tensor, x: Tensor) -> Tensor:
        """x against all that it may see: (K, H / K, n, L, P + L)."""
        found = x @ own.transpose(-1, -2)
        return torch.cat([self.beside(x, before.transpose(-1, -2)), found], -1) if self.known else found

    def mixed(self, p: Tensor, own: Tensor, before: Tensor) -> Tensor:
        """Weights (K, H / K, n, L, P + L) times what they weigh."""
        y = p[..., self.known : self.known + self.block.length] @ own
        return y + self.beside(p[..., : self.known], before) if self.known else y

    def back(self, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of `mixed` towards `own` and `before`, for the gradient x of its result."""
        own = (p[..., self.known : self.known + self.block.length].transpose(-1, -2) @ x).sum(1, keepdim=True)
        return own, p[..., : self.known].flatten(1, 3).transpose(-1, -2) @ x.flatten(1, 3)

    def hidden(self) -> Tensor:
        """(L, P + L) bool. What stands before are the tokens at places 0 .. P - 1 = first - 1 of the examples."""
        i = torch.arange(self.block.first, self.block.first + self.block.length, device=self.q.device)[:, None]
        j = torch.arange(self.block.first + self.block.length, device=self.q.device)
        return (j > i) | (i - j >= self.rule.window) if self.rule.window else j > i

    def weights(self) -> tuple[Tensor, Tensor]:
        scores = self.rule.scores(self.against(self.k, self.kb, self.q))
        return scores, self.rule.weights(scores, self.hidden())

    def forward(self) -> Tensor:
        return self.mixed(self.weights()[1], self.v, self.vb)

    def backward(self, dy: Tensor) -> tuple[Tensor, ...]:
        """dq, dk, dv of the block's own tokens, dk and dv of those before."""
        scores, p = self.weights()
        dp = self.against(self.v, self.vb, dy)
        if self.rule.sinks is not None:
            dp = torch.cat([dp, dp.new_zeros(*dp.shape[:-1], 1)], -1)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)[..., : scores.shape[-1]] * self.rule.slope(scores)
        (dk, dkb), (dv, dvb) = self.back(ds, self.q), self.back(p, dy)
        return self.mixed(ds, self.k, self.kb), dk, dv, dkb, dvb


def grouped(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """As `plain`, block by block."""
    out = [_Part(b, rule, q, k, v).forward().reshape(len(q), -1, v.shape[-1]) for b in layout.blocks]
    return torch.cat(out, 1).index_select(1, layout.place)


def grouped_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. The weights are computed again, so that no more than one block's are ever held."""
    sizes = [len(b.rows) for b in layout.blocks]
    parts = dy.new_zeros(len(q), sum(sizes), dy.shape[-1]).index_copy_(1, layout.place, dy).split(sizes, 1)
    own: list[tuple[Tensor, ...]] = []
    before: list[tuple[Block, tuple[Tensor, ...]]] = []
    for block, rows in zip(layout.blocks, parts, strict=True):
        part = _Part(block, rule, q, k, v)
        *found, dkb, dvb = part.backward(rows.reshape(*part.q.shape[:-1], -1))
        own.append(tuple(x.reshape(-1, len(block.rows), x.shape[-1]) for x in found))
        before.append((block, (dkb, dvb)))
    dq, dk, dv = (torch.cat(found, 1).index_select(1, layout.place) for found in zip(*own, strict=True))
    for block, shared in before:
        for total, grad in zip((dk, dv), shared, strict=True):
            done = 0
            for start, n in block.before:
                total[:, start : start + n] += grad[:, done : done + n]
                done += n
    return dq, dk, dv


@torch.library.custom_op("trimtab::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scaling: float, softcap: float, window: int, sinks: Tensor | None
) -> Tensor:
    """q (1, H, T, d), k, v (1, K, T, .) -> (1, T, H, e), by `grouped`. One operator, so that compiled layers keep it whole."""
    y = grouped(q[0], k[0], v[0], Layout.of(handle).read(), Rule(scaling, softcap, window, sinks))
    return y.transpose(0, 1).contiguous()[None]


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scaling: float, softcap: float, window: int, sinks: Any) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("trimtab::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scaling: float, softcap: float, window: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rule = Rule(scaling, softcap, window, sinks)
    dq, dk, dv = grouped_backward(dy[0].transpose(0, 1), q[0], k[0], v[0], Layout.of(handle), rule)
    return dq[None], dk[None], dv[None]


@packed_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, handle, *ctx.numbers, sinks = inputs
    ctx.layout = Layout.of(handle)  # kept alive until the backward
    ctx.save_for_backward(q, k, v, handle, *([] if sinks is None else [sinks]))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, handle, *sinks = ctx.saved_tensors
    found = packed_attention_backward(dy, q, k, v, handle, *ctx.numbers, sinks[0] if sinks else None)
    return (*found, None, None, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_save)


# ---- as transformers calls it


def laid_out(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, d), key and value (1, K, T, .) -> (1, T, H, e). Raises `NotSupported` for what no layout can say."""
    unknown = sorted(k for k, x in more.items() if x is not None and k not in KNOWN)
    if layout is None:
        raise NotSupported("the layout does not reach the attention layers of this model")
    if attention_mask is not None or unknown:
        raise NotSupported(f"its attention takes {', '.join(unknown) or 'a mask of its own'}")
    if more.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotSupported("its attention is not causal")
    if dropout:
        raise NotSupported(f"its attention drops out {dropout:g} of the weights in training")
    if s_aux is not None and s_aux.requires_grad:
        raise NotSupported("the sinks of its attention are trained")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = _flex if query.is_cuda else packed_attention
    return form(query, key, value, layout, scaling, softcap or 0.0, sliding_window or 0, s_aux), None


def _flex(*args: Any) -> Tensor:
    from trimtab.engine.flex import flex

    return flex(*args)


ALL_ATTENTION_FUNCTIONS.register(NAME, laid_out)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)  # the layout says it


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """The model's attention reads layouts inside; forward and backward of a step both belong there."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


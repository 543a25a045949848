"""Attention over a packed row by torch's flex attention, for CUDA devices: blocks of the mask that are empty cost nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimtab.engine.layout import Layout


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scaling: float, softcap: float, window: int, sinks: Tensor | None
) -> Tensor:
    """q (1, H, T, d), k, v (1, K, T, .) -> (1, T, H, e); the same as `attention.plain`."""
    layout = Layout.of(handle).read()
    attend: Any = _compiled() if q.is_cuda else flex_attention
    out, lse = attend(
        q, k, v, score_mod=_cap(softcap) if softcap else None, block_mask=_mask(layout, window), scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1], return_lse=True,
    )  # fmt: skip
    if sinks is not None:  # one more logit in each softmax
        out = out * torch.sigmoid(lse - sinks.to(lse)[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2)


def _cap(softcap: float) -> Any:
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)


def _mask(layout: Layout, window: int) -> Any:
    def make() -> Any:
        end, place = layout.end, layout.position_ids

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (j <= i) & (i < end[j])
            return seen & (place[i] - place[j] < window) if window else seen

        return create_block_mask(visible, None, None, layout.length, layout.length, device=layout.device)

    return layout.once(("flex", window), make)

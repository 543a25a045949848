"""The loss of chosen tokens straight from hidden states: logits are made chunk by chunk and never kept.

    loss = sum over pairs p of weights[p] (log sum exp z[at[p]] - z[at[p], targets[p]]),   z = f(h W^T + b)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core.base import port
from trimtab.core.layer import AdapterLayer

CHUNK = 1 << 24  # logits made at a time: as many as a matrix product needs to be fast
STRIP = 1 << 20  # and turned into gradients at a time: 4 MB in float32, which a cache may hold

After = Callable[[Tensor], Tensor]  # what a model does to its logits: soft caps, scales


class Pairs:
    """Which row of the hidden states predicts which token, and for how many examples, on one device."""

    def __init__(self, at: Tensor, targets: Tensor, weights: Tensor) -> None:
        self.at, self.targets, self.weights = at, targets, weights
        self.known = at.cpu()  # ascending

    def chunks(
        self, stop: int, vocabulary: int, start: int = 0, logits: int | None = None
    ) -> Iterator[tuple[slice, slice]]:
        """Rows start .. stop of the hidden states, as many as make so many `logits` (`CHUNK`), and the pairs they predict."""
        size = max(16, (logits or CHUNK) // vocabulary)
        starts = [*range(start, stop, size), stop]
        edges = torch.searchsorted(self.known, torch.tensor(starts)).tolist()
        yield from zip(map(slice, starts, starts[1:]), map(slice, edges, edges[1:]), strict=True)


def losses(h: Tensor, head: nn.Module, after: After | None, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The weighted sum, differentiable, float32 or wider; and the loss of each pair `(P,)`, for the record.

    h (K, d). A frozen linear head gives the gradient of `h` on the way forward, so its logits are made once. A trained or
    adapted one makes them again in the backward.
    """
    frozen = not isinstance(head, AdapterLayer) and not any(p.requires_grad for p in head.parameters())
    if frozen and after is None and port(head).op.kind == "linear":
        return _Frozen.apply(h, head, pairs)  # type: ignore[return-value]
    # where nothing is supervised the head still sees no rows: its gradient is zero then, not missing
    chunks = list(pairs.chunks(len(h), _vocabulary(head))) or [(slice(0, 0), slice(0, 0))]
    each = torch.cat([
        checkpoint(_chunk, h[rows], head, after, pairs, rows.start, mine, use_reentrant=False) for rows, mine in chunks
    ])  # fmt: skip
    return (each * pairs.weights.to(each.dtype)).sum(), each.detach()


def _vocabulary(head: nn.Module) -> int:
    layer = head.base_layer if isinstance(head, AdapterLayer) else head
    return port(layer).shape[0] or int(getattr(layer, "out_features", 1 << 16))


def _chunk(h: Tensor, head: nn.Module, after: After | None, pairs: Pairs, first: int, mine: slice) -> Tensor:
    # `forward`, not the call: the engine's hook on the head is for the model's own use of it
    z = head.forward(h)
    z = z if after is None else after(z)
    logp = z.to(_wide(z)).log_softmax(-1)
    return -logp[pairs.at[mine] - first, pairs.targets[mine]]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Frozen(torch.autograd.Function):
    """Both results, and the gradient towards `h`, in one pass over the chunks."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
        base = port(head)
        w, b = base.weight(), base.bias()
        wide = _wide(h)
        each = torch.empty(len(pairs.at), dtype=wide, device=h.device)
        weights = pairs.weights.to(wide)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for rows, _ in pairs.chunks(len(h), len(w)):
            z = base.op(h[rows], w, b)  # (chunk, V); a strip at a time it becomes its own gradient
            for strip, mine in pairs.chunks(rows.stop, len(w), rows.start, STRIP):
                part = z[strip.start - rows.start : strip.stop - rows.start]
                at, targets = pairs.at[mine] - strip.start, pairs.targets[mine]
                logp = part.to(wide).log_softmax(-1)
                each[mine] = -logp[at, targets]
                if dh is not None:  # dz = (how many pairs) softmax(z) - (which tokens)
                    counts = torch.zeros(len(part), dtype=wide, device=h.device).index_add_(0, at, weights[mine])
                    dz = logp.exp_().mul_(counts[:, None])
                    dz.index_put_((at, targets), -weights[mine], accumulate=True)
                    part.copy_(dz)
            if dh is not None:
                dh[rows] = z @ w
        ctx.dh = dh
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        dh, ctx.dh = ctx.dh, None
        if dh is None:
            raise RuntimeError("the gradient of this loss was taken already, and is not kept for a second time")
        return (dh.to(grads[0].dtype) * grads[0]).to(dh.dtype), None, None

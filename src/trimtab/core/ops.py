"""How a kind of layer applies any weight of its kind.

Weights are canonical: `(out, in, *kernel)` whatever the layer stores. An `Op` is the layer minus its weight, so the same
three lines of a method serve a Linear, a Conv1D, an Embedding and a ConvNd.

    op(x, w, b)   apply weight w and bias b                      x (..., in) -> (..., out)
    op.mix(y, m)  a linear map along the output channels          y (..., r), m (out, r) -> (..., out)
    op.inp(v)     a vector over the inputs, shaped to broadcast with x;  op.out(v) likewise with y
    op.full(m)    m (out, r / groups) as the (out, r) matrix that `mix` applies
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import NotSupported


class Op:
    """Abstract. `kind` names what it does; methods that cannot carry a kind raise `NotSupported` when they are built."""

    kind = ""
    groups = 1

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def mix(self, y: Tensor, m: Tensor) -> Tensor:
        return F.linear(y, m)

    def inp(self, v: Tensor) -> Tensor:
        return v

    def out(self, v: Tensor) -> Tensor:
        return v

    def full(self, m: Tensor) -> Tensor:
        return m


class LinearOp(Op):
    kind = "linear"

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x.to(w.dtype), w, None if b is None else b.to(w.dtype))


class EmbeddingOp(Op):
    """Looks rows of `w.T` up: canonical weights of an embedding are `(dim, vocabulary)`."""

    kind = "embedding"

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        assert b is None
        layer: Any = self.layer
        if cast(Any, type(layer)).forward is not nn.Embedding.forward:  # scaled embeddings, as Gemma's
            return torch.func.functional_call(layer, {"weight": w.T}, (x,))
        return F.embedding(x, w.T, layer.padding_idx)

    def inp(self, v: Tensor) -> Tensor:
        raise NotSupported("token ids cannot be scaled: an embedding takes only methods that act on its output")


class ConvOp(Op):
    """A convolution without groups. Grouped layers show the block-diagonal dense weight, see `bases.dense`."""

    kind = "conv"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.groups: int = layer.groups  # type: ignore[assignment]
        weight: Any = layer.weight
        self.dims: int = weight.dim() - 2
        self.conv = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        layer: Any = self.layer
        x, padding = x.to(w.dtype), layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return self.conv(x, w, None if b is None else b.to(w.dtype), layer.stride, padding, layer.dilation)

    def mix(self, y: Tensor, m: Tensor) -> Tensor:
        return self.conv(y, m.view(*m.shape, *[1] * self.dims), groups=self.groups)

    def full(self, m: Tensor) -> Tensor:
        return m if self.groups == 1 else cast(Any, torch).block_diag(*m.chunk(self.groups))

    def inp(self, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * self.dims)

    out = inp


class NormOp(Op):
    """LayerNorm, RMSNorm and their relatives: the layer's own forward with another weight, a vector `(n,)`."""

    kind = "norm"

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        params = {"weight": w} if b is None else {"weight": w, "bias": b.to(w.dtype)}
        return torch.func.functional_call(self.layer, params, (x.to(w.dtype),))


class OpaqueOp(Op):
    """Any other module: it can be called and copied, but has no weight that an equation could act on."""

    kind = "module"


def along(v: Tensor, w: Tensor, dim: int) -> Tensor:
    """Vector `v` shaped to broadcast with weight `w` along `dim` (0: outputs, 1: inputs)."""
    return v.view([-1 if d == dim else 1 for d in range(w.dim())])

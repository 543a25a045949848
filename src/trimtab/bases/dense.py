"""Layers that store their weight densely: torch's Linear, Embedding and ConvNd, transformers' Conv1D, norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.base import Base, base, rebuilt
from trimtab.core.ops import ConvOp, EmbeddingOp, LinearOp, NormOp
from trimtab.errors import NotMergeable, NotSupported


@base("torch.nn.modules.linear.Linear")
class DenseLinear(Base):
    """weight (out, in). Subclasses with a forward of their own, or without floats, are refused: their weight differs."""

    def __init__(self, layer: Any) -> None:
        if type(layer).forward is not nn.Linear.forward or not layer.weight.dtype.is_floating_point:
            raise NotSupported(
                f"{type(layer).__module__}.{type(layer).__qualname__} is no plain Linear and trimtab has no base for it"
            )
        super().__init__(layer, LinearOp(layer), tuple(layer.weight.shape))

    def weight(self) -> Tensor:
        return self.layer.weight  # type: ignore[return-value]

    def rebuild(self, w: Tensor, b: Tensor | None) -> nn.Module:
        dtype = self.dtype
        return rebuilt(self.layer, weight=w.to(dtype), bias=None if b is None else b.to(dtype))


@base("transformers.pytorch_utils.Conv1D")
class TransposedLinear(DenseLinear):
    """transformers' Conv1D stores (in, out); it shows (out, in)."""

    transposed = True

    def __init__(self, layer: Any) -> None:
        Base.__init__(self, layer, LinearOp(layer), (layer.weight.shape[1], layer.weight.shape[0]))

    def weight(self) -> Tensor:
        return super().weight().T

    def rebuild(self, w: Tensor, b: Tensor | None) -> nn.Module:
        return super().rebuild(w.T.contiguous(), b)


@base("torch.nn.modules.sparse.Embedding")
class DenseEmbedding(TransposedLinear):
    """An embedding stores (vocabulary, dim); it shows (dim, vocabulary)."""

    def __init__(self, layer: Any) -> None:
        if layer.max_norm is not None:
            raise NotSupported("an embedding with max_norm changes its own weight in forward")
        Base.__init__(self, layer, EmbeddingOp(layer), (layer.embedding_dim, layer.num_embeddings))

    def rebuild(self, w: Tensor, b: Tensor | None) -> nn.Module:
        return rebuilt(self.layer, weight=w.T.contiguous().to(self.dtype))


@base("torch.nn.modules.conv.Conv1d", "torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv3d")
class DenseConv(DenseLinear):
    """weight (out, in, *kernel). A layer with groups stores (out, in / groups, *kernel) and shows the block-diagonal weight
    of the same function, so that no equation needs to know of groups; `rebuild` takes a weight that is zero off the blocks."""

    def __init__(self, layer: Any) -> None:
        Base.__init__(self, layer, ConvOp(layer), (layer.out_channels, layer.in_channels, *layer.kernel_size))

    def weight(self) -> Tensor:
        w, groups = super().weight(), self.op.groups
        if groups == 1:
            return w
        own = torch.eye(groups, dtype=w.dtype, device=w.device).view(groups, 1, groups, *[1] * (w.dim() - 1))
        blocks = w.unflatten(0, (groups, -1)).unsqueeze(2) * own  # (group, out in it, group, in of it, *kernel)
        return blocks.flatten(2, 3).flatten(0, 1)

    def rebuild(self, w: Tensor, b: Tensor | None) -> nn.Module:
        if self.op.groups == 1:
            return super().rebuild(w, b)
        parts = [part[:, own] for part, own in zip(w.chunk(self.op.groups), self._columns(), strict=True)]
        if sum(p.count_nonzero() for p in parts) != w.count_nonzero():
            raise NotMergeable("the adapter mixes the groups of a grouped convolution, which its weight cannot hold")
        return super().rebuild(torch.cat(parts), b)

    def _columns(self) -> list[slice]:
        n = self.shape[1] // self.op.groups
        return [slice(g * n, (g + 1) * n) for g in range(self.op.groups)]


@base("torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.normalization.RMSNorm", "*RMSNorm", "*LayerNorm")
class Norm(DenseLinear):
    """weight (n,)."""

    def __init__(self, layer: Any) -> None:
        if getattr(layer, "weight", None) is None or layer.weight.dim() != 1:
            raise NotSupported(f"{type(layer).__name__} has no weight vector")
        Base.__init__(self, layer, NormOp(layer), tuple(layer.weight.shape))

"""Linear layers that hold their weight in the 16 bits it is stored in, and multiply in float32.

What a CPU without bfloat16 products runs: the numbers of a float32 model, to the last bit, in half its memory. Widening a
weight costs no more time than reading a wide one, but for a token or a few.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.bases.dense import DenseLinear
from trimtab.core.base import Base, base
from trimtab.core.ops import LinearOp
from trimtab.masters import HALVES


class _Read(torch.autograd.Function):
    """y = x W^T + b,  dx = dy W. W is widened in each of the two, so that no wide copy of it waits for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (w,), (dy,) = ctx.saved_tensors, grads
        return dy @ w.to(dy.dtype), None, None


class HeldLinear(nn.Linear):
    """y = x W^T + b in the dtype of x; W (out, in) in 16 bits, the layer's own, b float32."""

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return _Read.forward(input, self.weight, self.bias)
        return _Read.apply(input, self.weight, self.bias)  # type: ignore[return-value]


@base("trimtab.bases.held.HeldLinear")
class Held(DenseLinear):
    """weight: float32, every 16-bit number is one. rebuild: a layer with that float32 weight, not rounded."""

    def __init__(self, layer: Any) -> None:
        Base.__init__(self, layer, LinearOp(layer), tuple(layer.weight.shape))

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.layer.weight.dtype, torch.float32)  # type: ignore[union-attr,arg-type]

    def weight(self) -> Tensor:
        return super().weight().to(self.dtype)


def held(model: nn.Module) -> str:
    """In what the layers of a model hold their weights; empty where none does."""
    kinds = {m.weight.dtype for m in model.modules() if type(m) is HeldLinear} & {*HALVES}
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def hold(model: Any) -> bool:
    """Make a frozen 16-bit causal language model compute in float32, in place: plain linear layers hold their weights as they
    are, all else is widened, the output layer too, and so is a layer whose weight the model's own code may read by itself:
    one that a forward of two tokens does not call. False: none is held."""
    head, linear = model.get_output_embeddings(), []
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear and layer is not head and layer.weight.dtype in HALVES:
            linear.append((path, layer))
    others = set(model.modules()) - {layer for _, layer in linear}
    shared = {id(p) for module in others for p in module.parameters(recurse=False)}
    kept = {id(layer.weight) for _, layer in linear} - shared
    for path, layer in linear:
        if id(layer.weight) in kept:
            model.set_submodule(path, HeldLinear(layer))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype in HALVES and id(tensor) not in kept:
            tensor.data = tensor.data.float()
    read = _called(model) if kept else set()
    for layer in model.modules():
        if type(layer) is HeldLinear and layer not in read:
            layer.weight.data = layer.weight.data.float()  # a plain layer, but for its class
    return bool(read)


@torch.no_grad()
def _called(model: Any) -> set[nn.Module]:
    """The held layers that a forward of two tokens calls; none, where one is not given float32, or the forward fails."""
    seen: dict[nn.Module, torch.dtype] = {}
    hooks = [m.register_forward_pre_hook(partial(_note, seen)) for m in model.modules() if type(m) is HeldLinear]
    try:
        model(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)
    except (RuntimeError, TypeError, ValueError):  # of a product of two dtypes; another one is met again, and said, later
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    return set(seen) if set(seen.values()) == {torch.float32} else set()


def _note(seen: dict[nn.Module, torch.dtype], module: nn.Module, args: tuple[Any, ...]) -> None:
    seen[module] = args[0].dtype

"""LoRA over a frozen linear layer, dense or 4-bit, as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases.bnb4 import Bnb4
from trimtab.bases.dense import DenseLinear, TransposedLinear
from trimtab.core.adapter import fused
from trimtab.core.base import Base
from trimtab.methods.lora import LoRA


class Product(torch.autograd.Function):
    """y = x W^T + b + s (z A^T) B^T, where z is x, or x after dropout

        g = dy B    dx = dy W    dz = s g A    dA = s g^T z    dB = s dy^T (z A^T)

    x, z (..., in), W (out, in), A (r, in), B (out, r); where z is x, dx + dz are formed in one buffer. Every product runs in
    the dtype of x; A, B and their gradients keep their own. The backward is left z and z A^T (..., r), nothing else: W is
    asked of the base again, so that no dense copy of a 4-bit weight outlives its product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, A: Tensor, B: Tensor, s: float, base: Base) -> Tensor:
        u = x if z is None else z
        ua = _rows(u) @ A.to(x.dtype).T  # (tokens, r)
        y = _plus(base(_rows(x)), ua, (s * B).to(x.dtype).T)  # (tokens, out)
        adapter = any(ctx.needs_input_grad[2:4])
        ctx.save_for_backward(*((u, ua) if adapter else (None, None)), A, B)
        ctx.s, ctx.base, ctx.shape, ctx.dropped = s, base, x.shape, z is not None
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], base.shape[0]))  # not tracked: callers may write into it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_z, need_A, need_B, *_ = ctx.needs_input_grad
        u, ua, A, B = ctx.saved_tensors
        dy, s = _rows(grads[0]), ctx.s
        if need_B and torch.is_grad_enabled():  # to be differentiated in turn, and so through z A^T
            ua = _rows(u) @ A.to(u.dtype).T
        g = dy @ B.to(dy.dtype)  # (tokens, r)
        sA = (s * A).to(dy.dtype)
        dx = dz = dA = dB = None
        if need_x:
            dx = dy @ ctx.base.weight().to(dy.dtype)
            dx = (dx if ctx.dropped else _plus(dx, g, sA)).view(ctx.shape)
        if need_z:
            dz = (g @ sA).view(ctx.shape)
        if need_A:
            dA = s * (g.T @ _rows(u)).to(A.dtype)
        if need_B:
            dB = s * (ua.T @ dy).T.to(B.dtype)  # in this order the long product is read along its rows
        return dx, dz, dA, dB, None, None


def _plus(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, in the memory of y. Compiled code would copy y first; it gets a sum, to be taken where y is next read."""
    return y + a @ b if torch.compiler.is_compiling() else y.addmm_(a, b)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


_PLAIN = (Tensor, nn.Parameter)  # other tensors bring kernels of their own
_DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # float16 underflows where float32 adapters' gradients do not


_FEW = 64  # tokens below which small float32 products start faster than bfloat16 ones (1 token: 145 us against 230)


def _watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@fused(LoRA, DenseLinear, TransposedLinear, Bnb4)
def product(adapter: LoRA, base: Base, x: Tensor) -> Tensor | None:
    """None, so that the adapter answers itself: mixed dtypes, float16, autocast to another dtype, a bias on B, a scale in a
    tensor, a base that is trained, hooked or kept in a tensor of another kind, functorch; and decoding, a few tokens without
    gradient."""
    (A, B), layer = adapter.factors(), base.layer
    w: Any = layer.weight
    b, device = base.bias(), x.device.type
    if (
        type(x) not in _PLAIN
        or x.dtype != base.dtype
        or x.dtype not in _DTYPES
        or adapter.lora_B.bias is not None
        or isinstance(adapter.s, Tensor)
        or w.requires_grad
        or (b is not None and b.requires_grad)
        or (type(w) not in _PLAIN and type(base) is not Bnb4)
        or _watched(layer)
        or _watched(adapter)
        or (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype)
        or torch._C._are_functorch_transforms_active()
        or (not torch.is_grad_enabled() and x.numel() < _FEW * x.shape[-1])
    ):
        return None
    z = adapter.drop(x) if adapter.training and adapter.drop.p else None  # type: ignore[union-attr,operator]
    return Product.apply(x, z, A, B, adapter.s, base)  # type: ignore[return-value]

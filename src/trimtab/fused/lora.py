"""LoRA over a frozen linear layer, dense or 4-bit: two products beside the layer's own, the first one for all that read it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases.bnb4 import Bnb4
from trimtab.bases.dense import DenseLinear, TransposedLinear
from trimtab.bases.held import Held
from trimtab.core.adapter import fused
from trimtab.core.base import Base
from trimtab.methods.lora import LoRA


class First(torch.autograd.Function):
    """u_i = x A_i^T for all A_i that stand before one input: by themselves, or those of q, k and v together

        g = [du_1 du_2 ...]    dx = g [A_1; A_2; ...]    [dA_1; dA_2; ...] = g^T x

    x (..., in), A_i (r_i, in), u_i (tokens, r_i). Products run in the dtype of x; A_i and their gradients keep their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *A: Tensor) -> Any:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *A)
        ctx.shape, ctx.ranks = x.shape, [len(a) for a in A]
        return (_rows(x) @ _stacked(A, x.dtype).T).split(ctx.ranks, 1)

    @staticmethod
    def backward(ctx: Any, *du: Tensor) -> tuple[Tensor | None, ...]:
        x, *A = ctx.saved_tensors
        g = torch.cat([*du], 1)
        dx = (g @ _stacked(A, g.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dA = (None,) * len(A) if x is None else (g.T @ _rows(x)).split(ctx.ranks)
        return dx, *(None if d is None else d.to(a.dtype) for d, a in zip(dA, A, strict=True))


def _stacked(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (torch.cat([*A]) if len(A) > 1 else A[0]).to(dtype)


class Product(torch.autograd.Function):
    """y = x W^T + b + s u B^T

        dx = dy W    du = s dy B    dB = s dy^T u

    x (..., in), u (tokens, r), W (out, in), B (out, r). Products run in the dtype of x; B and its gradient keep their own. The
    backward is left u alone: W is asked of the base again, so that no wide copy of a narrow weight outlives its product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, B: Tensor, s: float, base: Base) -> Tensor:
        ctx.save_for_backward(u if ctx.needs_input_grad[2] else None, B)
        ctx.s, ctx.base, ctx.shape = s, base, x.shape
        y, sB, shaped = base(_rows(x)), (s * B).to(x.dtype).T, (*x.shape[:-1], base.shape[0])
        if torch.compiler.is_compiling():  # y + u sB as it stands becomes one product into a copy of y; so, a sum
            return y.view(shaped) + (u @ sB).view(shaped)
        return torch.ops.aten._unsafe_view(y.addmm_(u, sB), shaped)  # not tracked: callers may write into it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, B = ctx.saved_tensors
        dy = _rows(grads[0])
        dx = du = dB = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ ctx.base.weight().to(dy.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            du = dy @ (ctx.s * B).to(dy.dtype)
        if u is not None:
            dB = ctx.s * (u.T @ dy).T.to(B.dtype)  # in this order the long product is read along its rows
        return dx, du, dB, None, None


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


@fused(LoRA, DenseLinear, TransposedLinear, Held, Bnb4)
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
    dropped = adapter.training and adapter.drop.p  # type: ignore[union-attr]
    u = First.apply(adapter.drop(x), A)[0] if dropped else _first(adapter, A, x)  # type: ignore[operator,index]
    return Product.apply(x, u, B, adapter.s, base)  # type: ignore[return-value]


# ---- one first product for adapters that read the same input

_NOTHING: tuple[Any, Any] = None, None
_seen: tuple[Any, Any] = (lambda: None, lambda: None)  # the input of the last call, and who was the first to read it


def _first(adapter: Any, A: Tensor, x: Tensor) -> Tensor:
    """x A^T (tokens, r). In compiled code the adapters that read one input, as q, k and v do, are answered together at the
    first one's turn, and find their part at their own. Which do stands in no list: it is seen on passes that are not compiled,
    and those answer each by itself, so that they round the same whatever came before."""
    if not torch.compiler.is_compiling():
        _see(adapter, x)
        return First.apply(x, A)[0]  # type: ignore[index]
    mine, u = getattr(adapter, "found", _NOTHING)
    if mine is x:
        adapter.found = _NOTHING
        return u
    mates = [m for m in getattr(adapter, "mates", ()) if _joins(m, x)]
    u, *others = First.apply(x, A, *(m.factors()[0] for m in mates))  # type: ignore[misc]
    for mate, other in zip(mates, others, strict=True):
        mate.found = x, other
    return u


def _joins(mate: Any, x: Tensor) -> bool:
    """Whether this pass may answer it too; a weight may lie elsewhere, or in parts."""
    A = mate.factors()[0]
    return A.requires_grad and A.device == x.device and A.shape[1:] == x.shape[-1:] and not (mate.training and mate.drop.p)


def _see(adapter: Any, x: Tensor) -> None:
    """Take down who reads what the call before it read, too."""
    global _seen
    (before, first), now = _seen, (weakref.ref(x), weakref.ref(adapter))
    leader = first() if before() is x else None
    adapter.mates = ()
    if leader is None or leader is adapter:
        _seen = now
    elif adapter not in leader.mates:
        leader.mates += (adapter,)

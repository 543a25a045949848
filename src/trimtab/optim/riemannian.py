"""Riemannian preconditioning: the step of a low-rank product does not depend on how it is split into factors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trimtab.errors import ConfigError
from trimtab.inits._start import Started
from trimtab.optim._pairs import inverse, parts


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """`optimizer_cls` on preconditioned gradients of each trained pair of factors                  arXiv:2402.02347

    g_A <- (B^T B + reg)^-1 g_A,  g_B <- g_B (A A^T + reg)^-1

    A (r, in), B (out, r). Other parameters, and adapters on embeddings, are updated as they are. `kwargs` are the
    optimizer's. Raises `ConfigError` for optimizers that evaluate the loss themselves.
    """
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"{optimizer_cls.__name__} evaluates the loss itself, on gradients that are not preconditioned")
    products = [part for part in parts(model) if part.lora_A.weight.requires_grad]

    class Riemannian(optimizer_cls):  # type: ignore[valid-type,misc]
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if closure is not None:
                raise ConfigError("a closure computes gradients anew, which would not be preconditioned: call step() alone")
            for part in products:
                precondition(part, reg)
            return super().step()

    Riemannian.__name__ = Riemannian.__qualname__ = f"Riemannian{optimizer_cls.__name__}"
    make: Any = Riemannian  # each optimizer has arguments of its own
    return make([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)


@torch.no_grad()
def precondition(part: Started, reg: float) -> None:
    A, B = part.lora_A.weight, part.lora_B.weight
    if A.grad is not None:
        left = inverse(B.T @ B, reg)
        A.grad.copy_(left @ A.grad.to(left))
    if B.grad is not None:
        right = inverse(A @ A.T, reg)
        B.grad.copy_(B.grad.to(right) @ right)

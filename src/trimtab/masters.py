"""What is trained on 16-bit bases is float32. A copy of a module computes with its weights rounded to the original's dtype:

    y = module(x; round(w)),   dL/dw = dL/d round(w)        w float32

The copy answers as the merged module will, to the last bit, in the dtypes of the original, whatever it does inside. Steps
that are smaller than 16 bits resolve add up in w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HALVES = (torch.float16, torch.bfloat16)


def born(dtype: torch.dtype, full_precision: bool) -> torch.dtype:
    """In which an adapter starts on a layer that computes in `dtype`."""
    low = dtype in HALVES or dtype.itemsize == 1
    return torch.float32 if full_precision and low else dtype


def raised(copy: nn.Module, full_precision: bool) -> None:
    """Raise the parameters of a copied module to float32, in place. Not where a recurrent layer is in it: torch keeps its
    weights in a second list, past which they cannot be rounded for a call."""
    if full_precision and not any(isinstance(m, nn.RNNBase) for m in copy.modules()):
        for p in copy.parameters():
            p.data = p.data.float() if p.dtype in HALVES else p.data


def called(copy: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    """What `copy` answers with its parameters rounded to those of `original`."""
    if type(copy).forward is nn.Embedding.forward:
        return copy(*args, **kwargs).to(original.weight.dtype)  # the rows that are looked up, not all
    stored = {name: p.dtype for name, p in original.named_parameters()}
    rounded = {k: p.to(stored[k]) for k, p in copy.named_parameters() if stored.get(k, p.dtype) != p.dtype}
    return torch.func.functional_call(copy, rounded, args, kwargs) if rounded else copy(*args, **kwargs)


def rounded(copy: nn.Module, original: nn.Module) -> nn.Module:
    """`copy`, frozen, each parameter rounded once to what `original` stores, in place."""
    stored = {name: p.dtype for name, p in original.named_parameters()}
    for name, p in copy.named_parameters():
        p.data = p.data.to(stored.get(name, p.dtype))
    return copy.requires_grad_(False)

"""Leading singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.adapter import Site
from trimtab.errors import ConfigError


def dense(site: Site) -> Tensor:
    """The frozen weight (out, in) in float32, or in float64 where the layer is in it."""
    w = site.base.weight().detach()
    return w.to(torch.promote_types(w.dtype, torch.float32))


def at_most(site: Site, r: int, limit: int) -> None:
    if r > limit:
        raise ConfigError(f"{site.name!r} {tuple(site.shape)}: its start has {limit} components, and r is {r}")


def leading(m: Tensor, q: int, niter: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (n, q), S (q), V^T (q, k) of the q largest singular values of m (n, k), by subspace iteration.

    Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1. The random start is drawn on the CPU, so that it is the
    same on every device.
    """
    start = torch.randn(m.shape[1], q, generator=draw, dtype=torch.float32).to(m)
    Q = torch.linalg.qr(m @ start).Q
    for _ in range(niter):
        Q = torch.linalg.qr(m @ torch.linalg.qr(m.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ m, full_matrices=False)
    return Q @ U, S, Vh

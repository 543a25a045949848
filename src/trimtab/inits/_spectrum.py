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

    Halko, Martinsson, Tropp, arXiv:0909.4061. The random start is drawn on the CPU, so that it is the
    same on every device.
    """
    start = torch.randn(m.shape[1], q, generator=draw, dtype=torch.float32).to(m)
    Q = torch.linalg.qr(m @ start).Q
    for _ in range(niter):
        Q = torch.linalg.qr(m @ torch.linalg.qr(m.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ m, full_matrices=False)
    return Q @ U, S, Vh


class Components:
    """Principal components of rows that come in batches, the k leading ones             Ross et al., IJCV 77 (2008)

    V (k, in) and S (k) of what was seen, of mean m and count n, take in b rows X of mean x by the decomposition of
    [S V; X - x; sqrt(n b / (n + b)) (m - x)].
    """

    def __init__(self, k: int) -> None:
        self.k, self.count, self.scatter = k, 0, 0.0  # scatter: the squared distances of all rows from their mean, summed
        self.V = self.S = self.mean = self.similar = torch.zeros(())  # similar: the cosine of each V with what it was before

    def see(self, X: Tensor, draw: torch.Generator) -> None:
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        n, b, x = self.count, len(X), X.mean(0)
        parts, apart = [X - x], torch.zeros_like(x)
        if n:
            apart = (n * b / (n + b)) ** 0.5 * (self.mean - x)
            parts = [self.S[:, None] * self.V, *parts, apart[None]]
        self.scatter += float((X - x).square().sum() + apart.square().sum())
        stacked = torch.cat(parts)
        small = min(stacked.shape) <= max(2 * self.k, 512)
        _, S, V = torch.linalg.svd(stacked, full_matrices=False) if small else leading(stacked, 2 * self.k, 4, draw)
        V = V[: self.k] * V[: self.k].gather(1, V[: self.k].abs().argmax(1, keepdim=True)).sign()  # the largest entry: above 0
        self.similar = torch.cosine_similarity(V, self.V) if n and len(V) == len(self.V) else torch.zeros(len(V))
        self.V, self.S, self.mean, self.count = V, S[: self.k], (n * self.mean + b * x) / (n + b), n + b

    def explained(self) -> Tensor:
        """The share of the variance that each component holds."""
        return self.S.square() / self.scatter

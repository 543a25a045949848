"""AdaMSS's start: the row space of a weight, its rows in clusters, and the directions of each.

The clusters are Lloyd's k-means from a random start, step by step as scikit-learn takes it for published adapters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.methods._budget import best, forget, score, track

SEED, STEPS, TOLERANCE = 123456789, 10, 1e-4  # as published


def clusters(rows: Tensor, count: int) -> Tensor:
    """The cluster (n) of each of `rows` (n, d), 0 .. count - 1; a cluster that runs empty takes the farthest row."""
    x = rows.detach().double().cpu()
    x, draws = x - x.mean(0), np.random.RandomState(SEED)
    n = len(x)
    centers = x[torch.as_tensor(draws.choice(n, size=count, replace=False, p=np.ones(n, np.float32) / np.float32(n)))]
    labels = torch.full((n,), -1)
    for _ in range(STEPS):
        distances = torch.cdist(x, centers)
        before, labels = labels, distances.argmin(1)
        sizes = labels.bincount(minlength=count)
        far = distances.gather(1, labels[:, None])[:, 0].argsort(descending=True)
        sums = torch.zeros_like(centers).index_add(0, labels, x)
        for empty, row in zip((sizes == 0).nonzero()[:, 0], far, strict=False):  # the row leaves its old cluster
            sums[labels[row]] -= x[row]
            sums[empty], sizes[empty], sizes[labels[row]] = x[row], 1, sizes[labels[row]] - 1
        moved = sums / sizes[:, None] - centers
        centers = centers + moved
        if torch.equal(before, labels):
            return labels
        if moved.square().sum() <= TOLERANCE * x.var(0, correction=0).mean():
            break
    return torch.cdist(x, centers).argmin(1)


def subspaces(w: Tensor, cfg: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """N (R, in), the cluster (out) of each row of w (out, in), and the right singular vectors (r_i, R) of the rows of U in
    each cluster, for w ~ U S N."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.random_seed)  # of the CPU alone, which is put back
        U, _, V = torch.svd_lowrank(w, q=min(cfg.r, *w.shape), niter=2)
    rows, A = clusters(U, min(cfg.num_subspaces, len(U))), []
    for i in range(int(rows.max()) + 1):
        _, sizes, directions = torch.linalg.svd(U[rows == i], full_matrices=False)
        rank = min(cfg.subspace_rank, len(sizes))
        if cfg.use_dynamic_rank:  # by the singular values of U_i U_i^T
            rank = max(1, min(rank, int((sizes**2 > cfg.svd_threshold * sizes[0] ** 2).sum())))
        A.append(directions[:rank].contiguous())
    return V.T.contiguous(), rows, A


def retire(parts: list[Any], count: int) -> None:
    """Train no more than the `count` most important clusters of the whole model on, of those that still are."""
    live = [(part, i) for part in parts for i in range(len(part.on)) if part.on[i]]
    scores = [score(part, f"adamss_A.{i}").mean() + score(part, f"adamss_B.{i}").mean() for part, i in live]
    for (part, i), kept in zip(live, best(torch.stack(scores), count).tolist(), strict=True):
        part.on[i] = kept
        for p in () if kept else (part.adamss_A[i], part.adamss_B[i]):
            p.grad = None
    for part in parts:
        forget(part)


def resize(part: Any, shapes: dict[str, torch.Size]) -> None:
    """The sizes of clusters that came out otherwise elsewhere. What was in the tensors is lost; a file follows."""
    for name, p in list(part.named_parameters()):
        which, _, i = name.partition(".")
        if shapes.get(name, p.shape) != p.shape:
            getattr(part, which)[int(i)] = nn.Parameter(p.new_zeros(shapes[name]), requires_grad=p.requires_grad)
    if part.remembers:
        part.remembers = ("on", *track(part))

"""FRoD's search for a basis: one for all layers of a role, from their weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.errors import NotSupported
from trimtab.methods._low_rank import weight_of


def role(name: str) -> str:
    """What layers that share a basis have in common: the last two parts of their path."""
    above, leaf = ["", *name.split(".")][-2:]
    if name.split(".")[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return leaf if not above or above.isdigit() else f"{above}_{leaf}"


def depth(name: str) -> int | None:
    """The layer's number: the one after `layers`, else the first."""
    parts = name.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(p) for p in [*after, *parts] if p.isdigit()), None)


def basis(weights: list[Tensor], ridge: float) -> Tensor:
    """V (in, in) for the weights (out, in) of one role: right singular vectors where they have fewer rows than columns in
    all, else R^T E from their joint QR, with E the eigenvectors of the mean of (Q_i^T Q_i + ridge)^-1."""
    stacked = torch.cat(weights)
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked).Vh.T
    Q, R = torch.linalg.qr(stacked)
    eye, mean = ridge * torch.eye(len(R)), torch.zeros_like(R)
    for q in Q.split([len(w) for w in weights]):
        mean += torch.linalg.inv(q.T @ q + eye)
    return R.T @ torch.linalg.eigh(mean / len(weights)).eigenvectors


def coordinates(w: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (out, in) with columns of norm 1, and l (in), so that W = U diag(l) V^T; a column of norm 0 stays 0."""
    w64, V64 = w.double(), V.to(w).double()
    try:
        scaled = torch.linalg.solve(V64, w64.T).T
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        scaled = w64 @ torch.linalg.pinv(V64, rtol=1e-6).T
    l = scaled.norm(dim=0)
    return torch.where(l > 1e-12, scaled / l, 0).to(w.dtype), l.to(w.dtype)


def entries(n: int, share: float, draw: torch.Generator) -> Tensor:
    """(2, count) places off the diagonal of an (n, n) matrix, one at least if any."""
    count = min(max(1, int(n * n * share)) if share else 0, n * (n - 1))
    if not count:
        return torch.zeros(2, 0, dtype=torch.long)
    place = torch.randperm(n * (n - 1), generator=draw)[:count]
    row, column = place // (n - 1), place % (n - 1)
    return torch.stack([row, column + (column >= row)])


class Tables(nn.Module):
    """Buffers by the name of a role."""

    def __init__(self, tensors: dict[str, Tensor], saved: bool) -> None:
        super().__init__()
        self._buffers.update(tensors)
        self._non_persistent_buffers_set.update(() if saved else tensors)


class Shared(nn.Module):
    """frod_V, frod_s_indices and frod_s_size, each by role."""

    def __init__(self, cfg: Any, sites: Sequence[Site]) -> None:
        super().__init__()
        sides = {(role(s.name), math.prod(s.shape[1:])) for s in sites}
        if odd := [name for name, count in Counter(name for name, _ in sides).items() if count > 1]:
            raise NotSupported(f"FRoD: layers of the role {odd[0]!r} have different numbers of inputs; target them apart")
        found: dict[str, dict[int, Tensor]] = {}
        for i, site in enumerate(sites):  # of two with one role and number the later counts, as in published adapters
            key = depth(site.name)
            found.setdefault(role(site.name), {})[i if key is None else key] = weight_of(site).flatten(1).float().cpu()
        draw = torch.Generator().manual_seed(cfg.projection_prng_key)
        V = {k: basis([w for _, w in sorted(ws.items())], cfg.regularization_alpha) for k, ws in sorted(found.items())}
        self.frod_V = Tables(V, cfg.save_projection)
        where = {k: entries(len(v), cfg.sparse_rate, draw) for k, v in V.items()}
        self.frod_s_indices = Tables(where, cfg.save_projection)
        self.frod_s_size = Tables({k: torch.tensor(v.shape) for k, v in V.items()}, cfg.save_projection)

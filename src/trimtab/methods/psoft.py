"""PSOFT: a rotation of the r strongest directions of the weight among themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Excludes, FanIn, Layers, Targets, in_range, method, one_of, option
from trimtab.errors import NotSupported
from trimtab.methods._low_rank import precise


@dataclass(kw_only=True)
class PsoftConfig(Targets, Excludes, Layers, FanIn):
    r: int = option(32, "number of directions")
    psoft_alpha: int = option(32, "kept for the file format: it cancels out")
    psoft_dropout: float = option(0.0, "dropout on the input of the change")
    ab_svd_init: str = option(
        "psoft_init", "psoft_init: R acts on V; pissa_init: on sqrt(S) V", choices=("pissa_init",)
    )
    psoft_svd: str = option("full", "full or lowrank: how the directions are found", choices=("lowrank",))
    psoft_svd_lowrank_niter: int = option(10, "iterations of lowrank")
    random_seed: int = option(0, "seed of lowrank")
    psoft_orth: bool = option(True, "false: any r x r matrix instead of a rotation")
    psoft_mag_b: bool = option(True, "scale the rotation's rows")
    psoft_mag_a: bool = option(True, "scale the rotation's columns")
    use_cayley_neumann: bool = option(False, "approximate the Cayley transform by a Neumann series")
    num_cayley_neumann_terms: int = option(5, "terms of that series")
    cayley_neumann_eps: float | None = option(None, "largest norm of Q in that series")
    init_weights: bool = option(True, "true: no rotation at the start; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 2 if self.psoft_orth else 1)  # one direction alone cannot turn
        in_range("psoft_dropout", self.psoft_dropout, 0, 1)
        in_range("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 1)
        one_of("ab_svd_init", self.ab_svd_init, ["psoft_init", "pissa_init"])
        one_of("psoft_svd", self.psoft_svd, ["full", "lowrank"])
        if self.cayley_neumann_eps is not None:
            in_range("cayley_neumann_eps", self.cayley_neumann_eps, 0, 1)


class Rotation(nn.Module):
    """R = diag(b) (I + Q)(I - Q)^-1 diag(a),  Q = v - v^T: v (r (r - 1) / 2) is the upper triangle, row by row."""

    def __init__(self, cfg: PsoftConfig, site: Site) -> None:
        super().__init__()
        self.cfg, r = cfg, cfg.r
        self.weight = nn.Parameter(torch.zeros(r * (r - 1) // 2) if cfg.psoft_orth else torch.eye(r))
        self.vector_b = nn.Parameter(torch.ones(r)) if cfg.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if cfg.psoft_mag_a else None
        if not cfg.init_weights:
            self.weight.data += 0.1 * torch.randn(self.weight.shape, generator=site.generator("psoft_R"))

    def forward(self) -> Tensor:
        R = self.orthogonal() if self.cfg.psoft_orth else self.weight
        R = R if self.vector_b is None else self.vector_b[:, None] * R
        return R if self.vector_a is None else R * self.vector_a

    def orthogonal(self) -> Tensor:
        cfg, v = self.cfg, self.weight
        Q = v.new_zeros(cfg.r, cfg.r).index_put(tuple(torch.triu_indices(cfg.r, cfg.r, 1, device=v.device)), v)
        Q, eye = Q - Q.T, torch.eye(cfg.r, dtype=v.dtype, device=v.device)
        if not cfg.use_cayley_neumann:
            return torch.linalg.solve(precise(eye - Q), precise(eye + Q), left=False).to(v.dtype)
        if cfg.cayley_neumann_eps is not None:
            Q = Q * (cfg.cayley_neumann_eps / Q.norm().clamp(min=cfg.cayley_neumann_eps))
        t, R, power = cfg.num_cayley_neumann_terms, eye, eye
        for k in range(1, t):  # I + 2Q + 2Q^2 + ... + Q^(t-1)
            power = power @ Q
            R = R + (1 if 1 < k == t - 1 else 2) * power
        return R


@method("PSOFT", config=PsoftConfig, small={"r": 4})
class PSOFT(Adapter):
    """W' = W + L (R - I) M,  L = U S,  M = V^T                                                        arXiv:2505.11235

    U S V^T: the r largest singular triples of the frozen W, found again from the base when an adapter is loaded. R (r, r)
    starts at I. `pissa_init`: L = U sqrt(S), M = sqrt(S) V^T.
    """

    additive = True
    L: Tensor
    M: Tensor

    def __init__(self, cfg: PsoftConfig, site: Site) -> None:
        super().__init__()
        site.need("PSOFT", "linear", "embedding", "conv")
        w = site.base.weight().detach().float().flatten(1)
        if cfg.r > min(w.shape):
            raise NotSupported(f"PSOFT on {site.name!r}: r={cfg.r} is more than its {min(w.shape)} directions")
        if cfg.psoft_svd == "full":
            U, S, Vt = torch.linalg.svd(w, full_matrices=False)
        else:
            with torch.random.fork_rng([w.device] if w.is_cuda else []):
                torch.manual_seed(cfg.random_seed)
                U, S, V = torch.svd_lowrank(w, q=cfg.r, niter=cfg.psoft_svd_lowrank_niter)
                Vt = V.T
        S, share = S[: cfg.r], 1 if cfg.ab_svd_init == "psoft_init" else 0.5
        self.register_buffer("L", U[:, : cfg.r] * S**share, persistent=False)  # (out, r)
        self.register_buffer("M", (S ** (1 - share))[:, None] * Vt[: cfg.r], persistent=False)  # (r, in)
        self.psoft_R = Rotation(cfg, site)
        self.drop = nn.Dropout(cfg.psoft_dropout) if site.kind != "embedding" else nn.Identity()

    def change(self) -> Tensor:
        R = self.psoft_R()
        return self.L @ (R - torch.eye(len(R), dtype=R.dtype, device=R.device))  # (out, r)

    def weight(self, w: Tensor) -> Tensor:
        return w + (self.change() @ self.M).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.op.groups > 1:
            return super().forward(x, base)
        return base(x) + base.op.mix(base.op(self.drop(x), self.M.view(-1, *base.shape[1:])), self.change())

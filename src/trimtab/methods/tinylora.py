"""TinyLoRA: a handful of numbers, which move a weight within its own largest singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, seeded
from trimtab.core.base import Base
from trimtab.core.config import Biases, FanIn, Layers, Targets, in_range, method, one_of, option
from trimtab.methods._low_rank import mix, weight_of


@dataclass(kw_only=True)
class TinyLoraConfig(Targets, Layers, Biases, FanIn):
    r: int = option(2, "singular directions; at most as many as there are")
    u: int = option(64, "how many numbers are trained for a layer, or for those that share them")
    weight_tying: float = option(0.0, "0: each layer has its own numbers; 1: all share them")
    projection_seed: int = option(42, "seed of the frozen P")
    save_projection: bool = option(True, "write P into the adapter file")
    init_v_bound: float = option(0.02, "with init_weights `uniform`: between minus this and this")
    tinylora_dropout: float = option(0.0, "dropout on the input of the product; on embeddings, on its inner state")
    init_weights: bool | str = option(True, "true: zero; uniform, or false, which means the same")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("u", self.u, 1)
        in_range("weight_tying", self.weight_tying, 0, 1)
        in_range("tinylora_dropout", self.tinylora_dropout, 0, 1)
        one_of("init_weights", self.init_weights, [True, False, "uniform"])


class Vectors(nn.Module):
    """tinylora_v: one vector (u) for each run of layers that share one."""

    def __init__(self, cfg: TinyLoraConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        groups = max(1, round(len(sites) * (1 - cfg.weight_tying)))
        run, self.index = max(1, len(sites) // groups), {s.name: i for i, s in enumerate(sites)}
        self.group = {name: min(i // run, groups - 1) for name, i in self.index.items()}
        self.tinylora_v = nn.ParameterList(torch.zeros(cfg.u) for _ in range(groups))
        for i, v in enumerate(self.tinylora_v if cfg.init_weights is not True else ()):
            nn.init.uniform_(v, -cfg.init_v_bound, cfg.init_v_bound, generator=seeded(f"{sites[0].adapter}/v.{i}"))


@method("TINYLORA", config=TinyLoraConfig, small={"u": 5})
class TinyLoRA(Adapter):
    """W' = W + B (sum_i v_i P_i) A,  B = U_r sqrt(S_r),  A = sqrt(S_r) V_r  from  W = U S V               arXiv:2602.04118

    v (u) is trained, starts at 0 and may be shared; A (r, in), B (out, r) and P (u, r, r) ~ N(0, 1 / r) are frozen, and A and B
    are saved. On an embedding all is transposed: A (r, dim), B (vocabulary, r).
    """

    additive = True
    tinylora_A: Tensor
    tinylora_B: Tensor
    tinylora_P: Tensor

    def __init__(self, cfg: TinyLoraConfig, site: Site) -> None:
        super().__init__()
        self.shared: Any = site.shared
        self.group, self.transposed = self.shared.group[site.name], site.kind == "embedding"
        self.starts_at_base, self.drop = cfg.init_weights is True, nn.Dropout(cfg.tinylora_dropout)
        w = weight_of(site).flatten(1)
        U, S, V = torch.linalg.svd(w.T if self.transposed else w, full_matrices=False)
        root = S[: cfg.r].sqrt()
        draw = torch.Generator().manual_seed(cfg.projection_seed + self.shared.index[site.name])
        P = torch.normal(0.0, len(root) ** -0.5, (cfg.u, len(root), len(root)), generator=draw)
        self.register_buffer("tinylora_A", (root[:, None] * V[: cfg.r]).contiguous())
        self.register_buffer("tinylora_B", (U[:, : cfg.r] * root).contiguous())
        self.register_buffer("tinylora_P", P, persistent=cfg.save_projection)

    @classmethod
    def share(cls, cfg: TinyLoraConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:
            site.need("TinyLoRA", "linear", "embedding", "conv")
        return Vectors(cfg, sites)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two maps whose product is W' - W: (r, in) and (out, r)."""
        R = torch.einsum("i,ijk->jk", self.shared.tinylora_v[self.group], self.tinylora_P)
        if self.transposed:
            return self.tinylora_B.T, (R @ self.tinylora_A).T
        return self.tinylora_A, self.tinylora_B @ R

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.factors()
        return w + (B @ A).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B = self.factors()
        A = A.reshape(-1, *base.shape[1:])
        h = self.drop(base.op(x, A)) if self.transposed else base.op(self.drop(x), A)
        return base(x) + mix(h, base, B)

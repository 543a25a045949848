"""MiSS: one small matrix is added to every shard of the weight. Formerly Bone; `bat` and `mini` are its variants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, Layers, Targets, in_range, method, one_of, option
from trimtab.errors import NotSupported


@dataclass(kw_only=True)
class MissConfig(Targets, Excludes, Layers, Biases):
    r: int = option(64, "inputs of a shard; bat: size of a block, which divides inputs and outputs")
    miss_dropout: float = option(0.0, "dropout on the input of the change; none in bat")
    mini_r: int = option(1, "mini: columns of M, which divide the outputs")
    init_weights: bool | str = option(
        True, "true: start as the base; false: random; or a variant: bat, mini", choices=("bat", "mini")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("mini_r", self.mini_r, 1)
        in_range("miss_dropout", self.miss_dropout, 0, 1)
        one_of("init_weights", self.init_weights, [True, False, "bat", "mini"])


@method("MISS", config=MissConfig, small={"r": 4, "mini_r": 2})
class MiSS(Adapter):
    """W' = W + [M^T M^T ... M^T],  so that y = W x + M^T (x_1 + x_2 + ...)                            arXiv:2409.15371

    x_k: shards of r inputs, of which the last may be short. M (r, out) starts at 0. `mini`: M (r, mini_r) is repeated over
    the outputs. `bat`: W'_ij = W_ij + W_ij M_i + M_i on blocks of r x r, M (out / r, r, r).
    """

    additive = True

    def __init__(self, cfg: MissConfig, site: Site) -> None:
        super().__init__()
        site.need("MiSS", "linear", "embedding", "conv")
        self.r, out, inn = cfg.r, site.shape[0], math.prod(site.shape[1:])
        self.bat, self.point = cfg.init_weights == "bat", site.kind == "linear"
        self.additive = not self.bat
        width = cfg.mini_r if cfg.init_weights == "mini" else out
        if self.r > inn or out % width or (self.bat and (inn % self.r or out % self.r)):
            raise NotSupported(
                f"MiSS on {site.name!r}: r={cfg.r}, mini_r={cfg.mini_r} do not fit its weight {out} x {inn}"
            )
        self.copies = out // width
        self.miss_block = nn.Parameter(torch.zeros((out // self.r, self.r, self.r) if self.bat else (self.r, width)))
        if not cfg.init_weights:
            nn.init.kaiming_uniform_(self.miss_block, a=5**0.5, generator=site.generator("miss_block"))
        self.drop = nn.Dropout(cfg.miss_dropout)

    def weight(self, w: Tensor) -> Tensor:
        M, flat = self.miss_block, w.flatten(1)
        if self.bat:
            blocks = flat.to(M.dtype).unflatten(1, (-1, self.r)).unflatten(0, (-1, self.r))  # (out / r, r, in / r, r)
            return w + (torch.einsum("iakb,ibc->iakc", blocks, M) + M[:, :, None]).reshape_as(w)
        shards = -(-flat.shape[1] // self.r)
        return w + M.T.repeat(self.copies, shards)[:, : flat.shape[1]].reshape_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.bat or not self.point:
            return super().forward(x, base)
        z = self.drop(x).to(self.miss_block.dtype)
        z = nn.functional.pad(z, (0, -z.shape[-1] % self.r)).unflatten(-1, (-1, self.r)).sum(-2)  # (..., r)
        return base(x) + (z @ self.miss_block).repeat(*[1] * (z.dim() - 1), self.copies)

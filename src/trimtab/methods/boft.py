"""BOFT: a rotation of all inputs, as a product of sparse factors in butterfly order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, in_range, method, option
from trimtab.core.ops import along
from trimtab.errors import ConfigError, NotSupported
from trimtab.methods._low_rank import precise


@dataclass(kw_only=True)
class BOFTConfig(Targets, Excludes, Layers, Biases, FanIn):
    boft_block_size: int = option(4, "size of a block; give this or boft_block_num; it divides the inputs")
    boft_block_num: int = option(0, "number of blocks")
    boft_n_butterfly_factor: int = option(1, "number of factors; each one more lets twice as many inputs meet")
    boft_dropout: float = option(0.0, "share of the blocks of one factor that a training step leaves unrotated")
    init_weights: bool = option(True, "true: no rotation at the start; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("boft_n_butterfly_factor", self.boft_n_butterfly_factor, 1)
        in_range("boft_dropout", self.boft_dropout, 0, 1)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError(
                f"boft_block_size={self.boft_block_size}, boft_block_num={self.boft_block_num}: give one, and 0 for the other"
            )


@method("BOFT", config=BOFTConfig)
class BOFT(Adapter):
    """W' = diag(s) W R^T,  R = B_m ... B_1 B_0                                                        arXiv:2311.06243

    B_i = P_i blockdiag(D_i) P_i^T,  D = (I - S)(I + S)^-1,  S = (A - A^T) / 2.  A (factors, blocks, size, size) starts at 0
    and s (out) at 1; the bias is not scaled. P_i, in runs of size 2^i: first the even halves of blocks, then the odd ones.
    An embedding is rotated on its output.
    """

    order: Tensor

    def __init__(self, cfg: BOFTConfig, site: Site) -> None:
        super().__init__()
        site.need("BOFT", "linear", "embedding", "conv")
        self.dropout, self.on_output, factors = cfg.boft_dropout, site.kind == "embedding", cfg.boft_n_butterfly_factor
        n = site.shape[0] if self.on_output else math.prod(site.shape[1:])
        size = cfg.boft_block_size or n // cfg.boft_block_num
        if n % (cfg.boft_block_size or cfg.boft_block_num) or (factors > 1 and (size % 2 or n % (size << factors - 1))):
            raise NotSupported(f"BOFT on {site.name!r}: its {n} inputs are not cut into {factors} x blocks of {size}")
        self.point = site.kind == "linear" or self.on_output  # the input itself can be rotated
        self.boft_R = nn.Parameter(torch.zeros(factors, n // size, size, size))
        self.boft_s = nn.Parameter(torch.ones((1, site.shape[0]) if site.kind == "conv" else (site.shape[0], 1)))
        orders = [torch.arange(n).view(-1, 1 << i, 2, size // 2).transpose(1, 2).flatten() for i in range(1, factors)]
        self.register_buffer("order", torch.stack([torch.arange(n), *orders]), persistent=False)
        if not cfg.init_weights:
            nn.init.normal_(self.boft_R, std=0.1, generator=site.generator("boft_R"))
            nn.init.normal_(self.boft_s, mean=1, std=0.1, generator=site.generator("boft_s"))

    def blocks(self) -> Tensor:
        S = precise(self.boft_R - self.boft_R.mT) / 2
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        D = torch.linalg.solve(eye + S, eye - S, left=False)
        if self.training and self.dropout:
            factor, some = torch.randint(len(D), (1,)), torch.randperm(D.shape[1])[: int(self.dropout * D.shape[1])]
            D = D.index_put((factor, some), eye)
        return D

    def rotate(self, x: Tensor, *, back: bool = False) -> Tensor:
        """x R, or `back`, x R^T, for the last dimension of x."""
        D = self.blocks()
        x = x.to(D.dtype)
        for i in range(len(D)) if back else reversed(range(len(D))):
            order = self.order[i]
            x = x[..., order.argsort()] if i else x
            x = torch.einsum("...nk,nkc->...nc", x.unflatten(-1, D.shape[1:3]), D[i].mT if back else D[i]).flatten(-2)
            x = x[..., order] if i else x
        return x

    def weight(self, w: Tensor) -> Tensor:
        rotated = self.rotate(w.T).T if self.on_output else self.rotate(w.flatten(1), back=True).view_as(w)
        return rotated * along(self.boft_s.flatten(), w, 0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.point:
            return super().forward(x, base)
        if self.on_output:
            return self.rotate(base(x)) * self.boft_s.flatten()
        y, b, s = base(self.rotate(x).to(x.dtype)), base.bias(), self.boft_s.flatten()
        return y * s if b is None else (y - b) * s + b

"""OFT: the inputs are rotated, block by block, before the frozen layer sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, in_range, method, option
from trimtab.errors import ConfigError
from trimtab.methods._low_rank import precise


@dataclass(kw_only=True)
class OFTConfig(Targets, Excludes, Layers, Biases, FanIn):
    r: int = option(0, "number of blocks; give this or oft_block_size")
    oft_block_size: int = option(32, "size of a block; the nearest one that divides the inputs is taken")
    module_dropout: float = option(0.0, "share of the blocks that a training step leaves unrotated")
    init_weights: bool = option(True, "true: no rotation at the start; false: random")
    coft: bool = option(False, "keep each block within eps of no rotation")
    eps: float = option(6e-5, "bound for coft")
    block_share: bool = option(False, "one block, used everywhere")
    use_cayley_neumann: bool = option(True, "approximate the Cayley transform by a Neumann series")
    num_cayley_neumann_terms: int = option(5, "terms of that series")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("module_dropout", self.module_dropout, 0, 1)
        in_range("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 1)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"r={self.r}, oft_block_size={self.oft_block_size}: give one of the two, and 0 for the other"
            )


def divisor(n: int, wish: int) -> int:
    """The divisor of n nearest to `wish`, the lower one of two."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wish), d))


@method("OFT", config=OFTConfig, small={"oft_block_size": 4})
class OFT(Adapter):
    """W' = W R^T,  R = blockdiag(R_i),  R_i = (I - Q)(I + Q)^-1,  Q = v - v^T              arXiv:2306.07280, 2506.19847

    The series is the transpose of that: R_i = I + 2Q + 2Q^2 + ... + Q^(t-1), as published checkpoints are trained.
    v (blocks, B (B - 1) / 2), the upper triangles row by row, starts at 0. An embedding is rotated on its output.
    """

    def __init__(self, cfg: OFTConfig, site: Site) -> None:
        super().__init__()
        site.need("OFT", "linear", "embedding", "conv")
        self.cfg, self.on_output = cfg, site.kind == "embedding"
        n = site.shape[0] if self.on_output else math.prod(site.shape[1:])
        self.size = n // divisor(n, cfg.r) if cfg.r else divisor(n, cfg.oft_block_size)
        self.blocks = n // self.size
        self.point = site.kind == "linear" or self.on_output  # the input itself can be rotated
        self.oft_R = Factor(1 if cfg.block_share else self.blocks, self.size * (self.size - 1) // 2)
        self.names = {"oft_R.": "oft_embedding_R."} if self.on_output else {}
        if not cfg.init_weights:
            nn.init.normal_(self.oft_R.weight, std=0.1, generator=site.generator("oft_R"))

    def rotation(self) -> Tensor:
        """(blocks, B, B)."""
        v, rows = self.oft_R.weight, torch.triu_indices(self.size, self.size, 1, device=self.oft_R.weight.device)
        if self.cfg.coft:  # v itself is kept inside, so that the optimizer does not wander off
            with torch.no_grad():
                norm, bound = 2**0.5 * v.norm(dim=1, keepdim=True), self.cfg.eps / v.shape[0] ** 0.5  # norm of Q
                v.mul_(torch.where(norm > bound * (1 + 1e-6), bound / norm, 1))  # inside, it stays
        Q = v.new_zeros(v.shape[0], self.size, self.size).index_put(
            (torch.arange(v.shape[0], device=v.device)[:, None], *rows), v
        )
        Q = Q - Q.mT
        R = self.series(Q) if self.cfg.use_cayley_neumann else self.cayley(Q)
        if self.training and self.cfg.module_dropout:
            kept = torch.rand(len(R), 1, 1, device=R.device) >= self.cfg.module_dropout
            R = torch.where(kept, R, torch.eye(self.size, dtype=R.dtype, device=R.device))
        return R.expand(self.blocks, -1, -1)

    def cayley(self, Q: Tensor) -> Tensor:
        eye = torch.eye(self.size, dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(precise(eye + Q), precise(eye - Q), left=False).to(Q.dtype)

    def series(self, Q: Tensor) -> Tensor:
        t, power = self.cfg.num_cayley_neumann_terms, Q
        R = torch.eye(self.size, dtype=Q.dtype, device=Q.device) + (2 * Q if t > 1 else 0)
        for k in range(2, t):  # the last term of the series is taken once
            power = power @ Q
            R = R + (2 if k < t - 1 else 1) * power
        return R.expand_as(Q)

    def rotate(self, x: Tensor, R: Tensor) -> Tensor:
        """x R for the last dimension of x."""
        return torch.einsum("...nk,nkc->...nc", x.to(R.dtype).unflatten(-1, (self.blocks, self.size)), R).flatten(-2)

    def weight(self, w: Tensor) -> Tensor:
        R = self.rotation()
        return self.rotate(w.T, R).T if self.on_output else self.rotate(w.flatten(1), R.mT).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.point:
            return super().forward(x, base)
        return (
            self.rotate(base(x), self.rotation())
            if self.on_output
            else base(self.rotate(x, self.rotation()).to(x.dtype))
        )

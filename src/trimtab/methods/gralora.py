"""GraLoRA: the weight in k x k blocks, each with a low-rank update of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, FanIn, Layers, Targets, in_range, method, option
from trimtab.errors import ConfigError, NotSupported
from trimtab.methods._low_rank import dropout, kaiming, product


@dataclass(kw_only=True)
class GraloraConfig(Targets, Layers, Biases, FanIn):
    r: int = option(32, "rank of a row of blocks: each block has r / gralora_k")
    hybrid_r: int = option(0, "rank of a plain low-rank update beside it")
    alpha: int | float = option(64, "the update is scaled by alpha / (r + hybrid_r)")
    gralora_dropout: float = option(0.0, "dropout on the input of the update")
    gralora_k: int = option(2, "blocks along each side; it divides r, inputs and outputs")
    init_weights: bool = option(True, "true: A random, B zero; false: both random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("hybrid_r", self.hybrid_r, 0)
        in_range("gralora_k", self.gralora_k, 1)
        in_range("gralora_dropout", self.gralora_dropout, 0, 1)
        if self.r % self.gralora_k:
            raise ConfigError(f"r={self.r} is no multiple of gralora_k={self.gralora_k}")


@method("GRALORA", config=GraloraConfig, small={"r": 4})
class GraLoRA(Adapter):
    """W'_jn = W_jn + s B_jn A_jn,  s = alpha / (r + r_h)     for blocks j of outputs, n of inputs       arXiv:2505.20355

    gralora_A (k, in / k, r): A_jn^T is the j-th r / k columns of its n-th matrix. gralora_B (k, r, out / k), at 0 at first:
    B_jn^T is the n-th r / k rows of its j-th matrix. `hybrid_r`: and W' gains s B_g A_g of rank r_h.
    """

    additive = True

    def __init__(self, cfg: GraloraConfig, site: Site) -> None:
        super().__init__()
        site.need("GraLoRA", "linear", "embedding", "conv")
        out, inn, self.k = site.shape[0], math.prod(site.shape[1:]), cfg.gralora_k
        if out % self.k or inn % self.k:
            raise NotSupported(f"GraLoRA on {site.name!r}: gralora_k={self.k} does not divide the layer's ({out}, {inn})")
        self.gralora_A = nn.Parameter(torch.empty(self.k, inn // self.k, cfg.r))
        self.gralora_B = nn.Parameter(torch.zeros(self.k, cfg.r, out // self.k))
        self.s, self.drop = cfg.alpha / (cfg.r + cfg.hybrid_r), dropout(cfg.gralora_dropout, site)
        kaiming(self.gralora_A.data.mT, site, "gralora_A")
        if not cfg.init_weights:
            kaiming(self.gralora_B.data.mT, site, "gralora_B")
        if cfg.hybrid_r:
            self.gralora_A_general, self.gralora_B_general = Factor(cfg.hybrid_r, inn), Factor(out, cfg.hybrid_r)
            kaiming(self.gralora_A_general.weight, site, "gralora_A_general")
            if not cfg.init_weights:
                kaiming(self.gralora_B_general.weight, site, "gralora_B_general")
        self.hybrid = cfg.hybrid_r > 0

    def blocks(self) -> tuple[Tensor, Tensor]:
        """A (n, in / k, j, r / k) and B (j, n, r / k, out / k)."""
        return self.gralora_A.unflatten(2, (self.k, -1)), self.gralora_B.unflatten(1, (self.k, -1))

    def delta(self, w: Tensor) -> Tensor:
        delta = torch.einsum("nijc,jnco->joni", *self.blocks()).reshape(len(w), -1)
        if self.hybrid:
            delta = delta + self.gralora_B_general.weight @ self.gralora_A_general.weight
        return self.s * delta.view_as(w)

    def weight(self, w: Tensor) -> Tensor:
        return w + self.delta(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, x = base(x), self.drop(x)
        if base.op.kind != "linear":
            return y + base.op(x, self.delta(base.weight()))
        A, B = self.blocks()
        h = torch.einsum("...ni,nijc->...jnc", x.to(A.dtype).unflatten(-1, (self.k, -1)), A)
        y = y + self.s * torch.einsum("...jnc,jnco->...jo", h, B).flatten(-2)
        if self.hybrid:
            y = y + self.s * product(x, base, self.gralora_A_general.weight, self.gralora_B_general.weight)
        return y

"""KaSA: LoRA with trained singular values, beside a weight without its smallest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.core.base import Base
from trimtab.core.config import in_range, method, option
from trimtab.core.group import Group
from trimtab.errors import NotSupported
from trimtab.methods._low_rank import product, weight_of
from trimtab.methods._variant import Variant
from trimtab.methods.lora import LoraConfig


@dataclass
class KasaConfig:
    beta: float = option(1e-4, "weight of the penalty on the singular values")
    gamma: float = option(1e-3, "weight of the penalty that keeps the factors orthogonal")

    def __post_init__(self) -> None:
        in_range("beta", self.beta, 0)
        in_range("gamma", self.gamma, 0)


@method("LORA", config=LoraConfig, small={"r": 4, "kasa_config": {}}, switch="kasa_config")
class KaSA(Variant):
    """W' = W - P Q + s B diag(d) A                                                        arXiv:2412.06071, eq. 3, 7, 8

    P Q, with P (out, r) and Q (r, in * kernel), are the r smallest singular components of W, found again from W when the
    adapter is loaded. d (r) starts random, B at 0. Penalty, over all layers (eq. 9-12): beta |d|^2 + gamma (|B^T B - 1| +
    |A A^T - 1|). The frozen weight stays as it is; where several are active, each takes away its own P Q.
    """

    starts_at_base = False
    P: Tensor
    Q: Tensor

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__(cfg, site)
        w, r = weight_of(site).flatten(1), len(self.lora.lora_A.weight)
        if site.base.op.groups > 1:
            raise NotSupported(f"KaSA does not fit {site.name!r}: singular components do not keep to its groups")
        if r >= min(w.shape):
            raise NotSupported(f"KaSA on {site.name!r}: r={r} takes away the whole weight; it is below {min(w.shape)}")
        U, S, V = torch.linalg.svd(w, full_matrices=False)
        self.register_buffer("P", U[:, -r:] * S[-r:], persistent=False)
        self.register_buffer("Q", V[-r:].contiguous(), persistent=False)
        self.lora_diag = nn.Parameter(torch.randn(r, generator=site.generator("lora_diag")))

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return self.lora_diag.view(-1, *[1] * (A.dim() - 1)) * A, B

    def weight(self, w: Tensor) -> Tensor:
        return super().weight(w) - (self.P @ self.Q).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return super().forward(x, base) - product(x, base, self.Q, self.P)

    @classmethod
    def penalty(cls, group: Group) -> Tensor | None:
        cfg: Any = group.config
        parts = [a for _, a in group.each(cls) if a.lora_diag.requires_grad]
        return torch.stack([a.regular(cfg.kasa_config) for a in parts]).sum() if parts else None

    def regular(self, cfg: KasaConfig) -> Tensor:
        A, B = super().factors()
        one = torch.eye(len(self.lora_diag)).to(A)
        errors = sum((m - one).norm() for m in (A.flatten(1) @ A.flatten(1).T, B.T @ B))
        return cfg.beta * self.lora_diag.square().sum() + cfg.gamma * errors

"""MiCA: a LoRA that writes into the directions that the weight uses least, and trains only what it reads."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from trimtab.core.adapter import Site
from trimtab.errors import ConfigError, NotSupported
from trimtab.inits._spectrum import at_most, dense
from trimtab.inits._start import Init, init


@init
class Mica(Init):
    """B = U_r, A = 0: U_r (out, r) the left singular vectors of the r smallest singular values of W        arXiv:2604.01694

    B stays as it is and is saved with A.
    """

    kinds = ("linear", "embedding", "conv")
    frozen = ("lora_B",)

    def __init__(self, cfg: Any, rest: str = "") -> None:
        super().__init__(cfg, rest)
        if odd := [f.name for f in fields(cfg) if f.metadata.get("variant") and getattr(cfg, f.name)]:
            raise ConfigError(f"init_lora_weights='mica' and {odd[0]} do not go together")

    def fits(self, site: Site, r: int) -> None:
        super().fits(site, r)
        if site.base.op.groups > 1:
            raise NotSupported(f"MiCA does not fit {site.name!r}: singular vectors do not keep to its groups")
        at_most(site, r, min(site.shape[0], math.prod(site.shape[1:])))

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        U, _, _ = torch.linalg.svd(dense(site).flatten(1), full_matrices=False)
        B.copy_(U[:, -B.shape[1] :].reshape(B.shape))

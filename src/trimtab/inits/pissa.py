"""PiSSA: the factors start as the principal part of the weight, so that what matters most is what is trained."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from trimtab.core.adapter import Site
from trimtab.errors import ConfigError
from trimtab.inits._spectrum import at_most, dense, leading
from trimtab.inits._start import Init, init


@init
class PiSSA(Init):
    """A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s) of W = U S V^T; the rest stays frozen        arXiv:2404.02948

    U_r (out, r), S_r, V_r (in, r): the r largest singular values. `pissa_niter_16`: found by 16 steps of a randomised subspace
    iteration, which is faster on large layers.
    """

    shifted = True

    def __init__(self, cfg: Any, rest: str = "") -> None:
        super().__init__(cfg)
        found = re.fullmatch(r"niter_(\d+)", rest)
        if rest and not found:
            raise ConfigError(f"init_lora_weights={cfg.init_lora_weights!r}: it is 'pissa', or 'pissa_niter_16'")
        self.niter = int(found[1]) if found else None
        self.repeats = self.niter is None

    def fits(self, site: Site, r: int) -> None:
        super().fits(site, r)
        at_most(site, r, min(site.shape))

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        r, w = A.shape[0], dense(site)
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(w, full_matrices=False)
        else:
            U, S, Vh = leading(w, r, self.niter, site.generator("pissa"))
        root = (S[:r] / s).sqrt()
        A.copy_(root[:, None] * Vh[:r])
        B.copy_(U[:, :r] * root)

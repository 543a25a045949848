"""OLoRA: the factors start as the first columns and rows of the weight's QR decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.adapter import Site
from trimtab.inits._spectrum import at_most, dense
from trimtab.inits._start import Init, init


@init
class OLoRA(Init):
    """B = Q_r, A = R_r of W = Q R; the rest stays frozen                                       arXiv:2406.01775

    Q_r (out, r) is orthonormal, R_r (r, in) upper triangular.
    """

    shifted = repeats = True

    def fits(self, site: Site, r: int) -> None:
        super().fits(site, r)
        at_most(site, r, min(site.shape))

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        Q, R = torch.linalg.qr(dense(site))
        A.copy_(R[: A.shape[0]])
        B.copy_(Q[:, : A.shape[0]])

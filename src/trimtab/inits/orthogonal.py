"""Both factors random and in orthogonal subspaces of the rank, so that their product is 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.adapter import Site
from trimtab.errors import ConfigError
from trimtab.inits._start import Init, init


@init
class Orthogonal(Init):
    """A = (G Q_0)^T / 10, B = H Q_1 / 10, so B A = 0                         datta0.github.io/posts/rethink-lora-init

    Q (r, r) is a random orthogonal matrix, Q_0 and Q_1 its rows of even and of odd number; G (in, r / 2) and H (out, r / 2)
    are normal.
    """

    def __init__(self, cfg: Any, rest: str = "") -> None:
        super().__init__(cfg, rest)
        if odd := [r for r in (cfg.r, *(cfg.rank_pattern or {}).values()) if r % 2]:
            raise ConfigError(f"init_lora_weights='orthogonal' halves the rank, so r={odd[0]} must be even")

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        r, draw = A.shape[0], site.generator("orthogonal")
        Q = torch.linalg.qr(torch.randn(r, r, generator=draw))[0]
        A.copy_((torch.randn(A.shape[1], r // 2, generator=draw) @ Q[0::2]).T / 10)
        B.copy_(torch.randn(B.shape[0], r // 2, generator=draw) @ Q[1::2] / 10)

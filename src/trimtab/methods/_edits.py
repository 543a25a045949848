"""What ReFT does with a hidden state, and with which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Factor, Site
from trimtab.errors import NotSupported
from trimtab.methods._blocks import NON_LINEAR


class Edit(nn.Module):
    """h + P^T (act(W h + b) - P h)"""

    def __init__(self, cfg: Any, size: int, site: Site, name: str) -> None:
        super().__init__()
        if cfg.r > size:
            raise NotSupported(f"LoReFT on {site.name!r}: r={cfg.r} of {size} dimensions")
        self.learned_source, self.projection = Factor(cfg.r, size, bias=cfg.r), Factor(cfg.r, size)
        self.orthogonal, self.subtract, self.drop = cfg.orthogonality, cfg.subtract_projection, nn.Dropout(cfg.dropout)
        self.non_linear = NON_LINEAR[cfg.non_linearity]() if cfg.non_linearity else nn.Identity()
        for part in ("learned_source", "projection"):
            nn.init.uniform_(getattr(self, part).weight, -(size**-0.5), size**-0.5, generator=site.generator(f"{name}.{part}"))

    def rows(self) -> Tensor:
        """P (r, size): as trained, or its rows made orthonormal one after the other."""
        V = self.projection.weight
        if not self.orthogonal:
            return V
        with torch.autocast(V.device.type, enabled=False):
            full = V if V.dtype == torch.float64 else V.float()
            return torch.linalg.solve_triangular(torch.linalg.cholesky(full @ full.T), full, upper=False).to(V.dtype)

    def forward(self, h: Tensor) -> Tensor:
        P, h = self.rows(), h.to(self.projection.weight.dtype)
        source = self.non_linear(nn.functional.linear(h, self.learned_source.weight, self.learned_source.bias))
        return self.drop(h + (source - h @ P.T if self.subtract else source) @ P)


def ends(real: Tensor, position: Tensor, prompt: Tensor, first: int, last: int) -> Tensor:
    """(rows, tokens): 1 for the `first` tokens of a row, 2 for the `last` of its prompt that are not among those."""
    front = real & (position < first)
    back = prompt & ~front & (prompt.flip(-1).cumsum(-1).flip(-1) <= last)
    return front.long() + 2 * back.long()

"""DEFT: a part of the outputs' space is taken out of the weight and given back trained. PaRa: it is taken out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, in_range, method, one_of, option
from trimtab.methods._low_rank import dropout, mix, precise, weight_of


@dataclass(kw_only=True)
class DeftConfig(Targets, Excludes, Layers, Biases, FanIn):
    r: int = option(8, "dimension of the part; at most the number of outputs")
    decomposition_method: str = option("relu", "relu, or qr: an orthogonal projection")
    init_scale: float = option(1.0, "size of R at the start without init_weights")
    alpha: float | None = option(None, "R is scaled by alpha / r; none: not scaled")
    para: bool = option(False, "PaRa: no R, the part is only taken out")
    deft_dropout: float = option(0.0, "dropout on the input of R")
    init_weights: bool = option(True, "true: R starts as what is taken out; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("deft_dropout", self.deft_dropout, 0, 1)
        one_of("decomposition_method", self.decomposition_method, ["relu", "qr"])


@method("DEFT", config=DeftConfig, small={"r": 4})
class DEFT(Adapter):
    """W' = W + Q (s R - V^T W),  s = alpha / r or 1

    NeurIPS 2025; without R (`para`) it is PaRa, ICLR 2025. P (out, r) starts random. relu: Q = P, V = max(P, 0); qr: Q = V,
    the orthogonal factor of P. R (r, in) starts at V^T W / s, so W' = W at the start, but not without it.
    """

    def __init__(self, cfg: DeftConfig, site: Site) -> None:
        super().__init__()
        site.need("DEFT", "linear", "embedding", "conv")
        out, inn = site.shape[0], math.prod(site.shape[1:])
        r = min(cfg.r, out)
        self.qr, self.s = cfg.decomposition_method == "qr", cfg.alpha / r if cfg.alpha else 1.0
        self.starts_at_base = not cfg.para
        self.drop = dropout(cfg.deft_dropout, site)
        self.deft_P = nn.Parameter(nn.init.normal_(torch.empty(out, r), std=0.02, generator=site.generator("deft_P")))
        self.deft_R: nn.Parameter | None = None
        if not cfg.para:
            std, draw = 0.02 * cfg.init_scale, site.generator("deft_R")
            self.deft_R = nn.Parameter(nn.init.normal_(torch.empty(r, inn), std=std, generator=draw))
        if self.deft_R is not None and cfg.init_weights:
            w = weight_of(site).flatten(1)
            self.to(w)
            self.deft_R.data = self.spans()[1].detach().T @ w / self.s

    def spans(self) -> tuple[Tensor, Tensor]:
        """Q and V, (out, r)."""
        if not self.qr:
            return self.deft_P, self.deft_P.relu()
        Q = torch.linalg.qr(precise(self.deft_P)).Q.to(self.deft_P.dtype)
        return Q, Q

    def weight(self, w: Tensor) -> Tensor:
        Q, V = self.spans()
        given = 0.0 if self.deft_R is None else self.s * self.deft_R
        return w + (Q @ (given - V.T @ w.flatten(1).to(V.dtype))).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:  # V^T W x is V^T of what the layer gives without its bias
        (Q, V), y, b = self.spans(), base(x), base.bias()
        h = -mix((y if b is None else y - base.op.out(b)).to(V.dtype), base, V.T)
        if self.deft_R is not None:
            h = h + self.s * base.op(self.drop(x), self.deft_R.view(-1, *base.shape[1:]))
        return y + mix(h, base, Q)

"""DeLoRA: a low-rank update whose strength is trained apart from its direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, Layers, Targets, in_range, method, option
from trimtab.methods._low_rank import dropout, kaiming, product, weight_of


@dataclass(kw_only=True)
class DeloraConfig(Targets, Excludes, Layers, Biases):
    r: int = option(8, "rank")
    delora_lambda: int | float = option(15, "strength at the start: a bound on the norm of the update")
    module_dropout: float = option(0.0, "dropout on the input of the update")
    init_weights: bool = option(True, "true: A random, B zero; false: both random")
    rank_pattern: dict[str, int] | None = option(dict, "r by layer name or regex")
    lambda_pattern: dict[str, float] | None = option(dict, "delora_lambda by layer name or regex")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("module_dropout", self.module_dropout, 0, 1)


@method("DELORA", config=DeloraConfig, small={"r": 4})
class DeLoRA(Adapter):
    """W' = W + (lambda / r) sum_i b_i a_i / (|b_i| |a_i|) diag(n)                                     arXiv:2503.18225

    a_i: the rows of A (r, in, *kernel); b_i: the columns of B (out, r), which starts at 0. n_j = |W_:j| of the frozen weight
    is kept, and saved. Norms below 1e-4 count as 1e-4.
    """

    additive = True
    delora_w_norm: Tensor

    def __init__(self, cfg: DeloraConfig, site: Site) -> None:
        super().__init__()
        site.need("DeLoRA", "linear", "embedding", "conv")
        (out, *fan_in), r = site.shape, site.pick(cfg.rank_pattern, cfg.r)
        self.delora_A = nn.Parameter(torch.empty(r, *fan_in))
        self.delora_B = nn.Parameter(torch.zeros(out, r))
        self.delora_lambda = nn.Parameter(torch.full((1,), float(site.pick(cfg.lambda_pattern, cfg.delora_lambda))))
        self.register_buffer("delora_w_norm", weight_of(site).norm(dim=0))  # (in, *kernel)
        self.drop = dropout(cfg.module_dropout, site)
        kaiming(self.delora_A, site, "delora_A")
        if not cfg.init_weights:
            kaiming(self.delora_B, site, "delora_B")

    def factors(self) -> tuple[Tensor, Tensor]:
        """A diag(n) (r, in, *kernel) and B with the strength in its columns."""
        a = self.delora_A.flatten(1).norm(dim=1).clamp(min=1e-4)  # (r)
        b = self.delora_B.norm(dim=0).clamp(min=1e-4)  # (r)
        return self.delora_A * self.delora_w_norm, self.delora_B * (self.delora_lambda / len(a) / (a * b))

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.factors()
        return w + (B @ A.flatten(1)).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + product(self.drop(x), base, *self.factors())

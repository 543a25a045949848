"""BEFT: a trained bias on the value projections, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Targets, method, option
from trimtab.errors import NotSupported

_TYPES = {
    "v": "t5 mt5",
    "value": "bert roberta",
    "value_proj": "deberta-v2",
    "v_proj": "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
}


@dataclass(kw_only=True)
class BeftConfig(Targets):
    init_weights: bool = option(True, "true: start as the base; false: random")


@method("BEFT", config=BeftConfig)
class BEFT(Adapter):
    """b' = b + beta,  beta (1, out)                                                                   arXiv:2509.15974

    A layer without a bias is merged into one that has one.
    """

    additive = True
    targets = {kind: [name] for name, kinds in _TYPES.items() for kind in kinds.split()}

    def __init__(self, cfg: BeftConfig, site: Site) -> None:
        super().__init__()
        site.need("BEFT", "linear", "conv", "norm")
        if site.kind == "norm" and site.base.bias() is None:
            raise NotSupported(f"BEFT on {site.name!r}: this norm layer cannot have a bias")
        self.beft_bias = nn.Parameter(torch.zeros(1, site.shape[0]))
        if not cfg.init_weights:
            nn.init.normal_(self.beft_bias, generator=site.generator("beft_bias"))

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor:
        return self.beft_bias.flatten() if b is None else b + self.beft_bias.flatten()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + base.op.out(self.beft_bias.flatten())

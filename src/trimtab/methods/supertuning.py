"""Super-Tuning: the weight's largest (or smallest) entries are trained; Supra puts a LoRA beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import Targets, in_range, method, option
from trimtab.errors import ConfigError, NotSupported
from trimtab.methods.shira import applied, raised


@dataclass(kw_only=True)
class SupertuningConfig(Targets):
    sparsity: float = option(0.99, "share of the entries that stay frozen")
    select_top: bool = option(True, "true: the largest entries are trained; false: the smallest")
    r: int | None = option(None, "Supra: rank of the LoRA beside them", choices=(2,))
    lora_alpha: float | None = option(None, "Supra: the LoRA is scaled by lora_alpha / r; none: 2 r")
    lora_dropout: float = option(0.0, "Supra: dropout on the LoRA's input")
    init_weights: bool = option(True, "true: start as the base; false: random")
    save_precomputed_indices: bool = option(True, "false: which entries is found again from the very same base")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("sparsity", self.sparsity, 0, 1)
        in_range("lora_dropout", self.lora_dropout, 0, 1)
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError(f"lora_alpha={self.lora_alpha!r} scales a LoRA, and without r there is none")
        if self.r is not None:
            in_range("r", self.r, 1)
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha


@method("SUPERTUNING", config=SupertuningConfig, small={"sparsity": 0.7})
class SuperTuning(Adapter):
    """W' = W + scatter(indices, v)  [+ (alpha / r) B A]                                               arXiv:2607.09287

    indices (n): the n = (1 - sparsity) in out entries of the frozen W that are largest in magnitude, counted row by row.
    v (n) and B (out, r) start at 0; A (r, in, *kernel).
    """

    additive = True
    supertuning_indices: Tensor

    def __init__(self, cfg: SupertuningConfig, site: Site) -> None:
        super().__init__()
        site.need("Super-Tuning", "linear", "embedding", "conv")
        size, (out, *fan_in) = math.prod(site.shape), site.shape
        if not (n := int(size * (1 - cfg.sparsity))) or size >= 2**31:
            raise NotSupported(
                f"Super-Tuning on {site.name!r}: sparsity={cfg.sparsity} leaves {n} of its {size} entries"
            )
        at = site.base.weight().detach().abs().flatten().topk(n, largest=cfg.select_top).indices.int()
        self.register_buffer("supertuning_indices", at, persistent=cfg.save_precomputed_indices)
        self.supertuning_values = nn.Parameter(torch.zeros(n))
        self.s = 0.0 if cfg.r is None or cfg.lora_alpha is None else cfg.lora_alpha / cfg.r
        if cfg.r is not None:
            self.supertuning_lora_A, self.supertuning_lora_B = Factor(cfg.r, *fan_in), Factor(out, cfg.r)
            nn.init.kaiming_uniform_(self.supertuning_lora_A.weight, a=5**0.5, generator=site.generator("lora_A"))
            self.drop = nn.Dropout(cfg.lora_dropout) if site.kind != "embedding" else nn.Identity()
        if not cfg.init_weights:
            nn.init.normal_(self.supertuning_values, generator=site.generator("supertuning_values"))
            if cfg.r is not None:
                nn.init.kaiming_uniform_(self.supertuning_lora_B.weight, a=5**0.5, generator=site.generator("lora_B"))

    def weight(self, w: Tensor) -> Tensor:
        w = raised(w, self.supertuning_indices.long(), self.supertuning_values)
        if not self.s:
            return w
        return w + self.s * (self.supertuning_lora_B.weight @ self.supertuning_lora_A.weight.flatten(1)).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.s and base.op.groups > 1:
            return super().forward(x, base)
        y = applied(x, base, self.supertuning_indices.long(), self.supertuning_values)
        if not self.s:
            return y
        A, B = self.supertuning_lora_A.weight, self.supertuning_lora_B.weight
        return y + self.s * base.op.mix(base.op(self.drop(x), A), B)

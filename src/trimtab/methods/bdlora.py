"""BD-LoRA: one of the two factors has blocks on its diagonal alone, so that servers can split it over devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Factor, Site
from trimtab.core.config import in_range, method, option
from trimtab.errors import ConfigError, NotSupported
from trimtab.methods._variant import Variant
from trimtab.methods.lora import LoraConfig


@dataclass
class BdLoraConfig:
    target_modules_bd_a: list[str] | None = option(None, "parts of the names of layers whose A has blocks")
    target_modules_bd_b: list[str] | None = option(None, "parts of the names of layers whose B has blocks")
    nblocks: int = option(1, "blocks of a factor")
    match_strict: bool = option(True, "true: each adapted layer is named in one of the two; false: the others are LoRA")

    def __post_init__(self) -> None:
        in_range("nblocks", self.nblocks, 1)
        if both := sorted({*(self.target_modules_bd_a or [])} & {*(self.target_modules_bd_b or [])}):
            raise ConfigError(f"use_bdlora: {both[0]!r} is both in target_modules_bd_a and in target_modules_bd_b")

    def side(self, name: str) -> str:
        """`a`, `b`, or nothing: the factor of the layer at this path that has blocks."""
        a, b = (any(part in name for part in names or []) for names in (self.target_modules_bd_a, self.target_modules_bd_b))
        if a and b:
            raise ConfigError(f"use_bdlora: {name!r} is named both by target_modules_bd_a and by target_modules_bd_b")
        if self.match_strict and not (a or b):
            raise ConfigError(
                f"use_bdlora: {name!r} is named neither by target_modules_bd_a nor by target_modules_bd_b; name it, or set"
                " match_strict=False, which makes it a LoRA"
            )
        return "a" * a + "b" * b


@method(
    "LORA",
    config=LoraConfig,
    small={"r": 4, "use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 2, "match_strict": False}},
    switch="use_bdlora",
)
class BDLoRA(Variant):
    """W' = W + s B A,  A = diag(A_1, ..., A_n)  or  B = diag(B_1, ..., B_n)                            arXiv:2510.23346

    n = nblocks. The blocks lie one below the other in the file: A (r, in / n, *kernel), B (out, r / n).
    """

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__(cfg, site)
        options: Any = cfg.use_bdlora
        (out, *fan_in), r, n = site.shape, len(self.lora.lora_A.weight), options.nblocks
        self.side, self.n = options.side(site.name), n
        rows, columns = (r, fan_in[0]) if self.side == "a" else (out, r)
        if self.side and (rows % n or columns % n):
            raise NotSupported(f"BD-LoRA on {site.name!r}: {self.side.upper()} ({rows} x {columns}) has no {n} equal blocks")
        if self.side == "b" and (cfg.lora_bias or site.base.op.groups > 1):
            raise NotSupported(f"BD-LoRA on {site.name!r}: a B of blocks goes with neither lora_bias nor groups")
        if self.side == "a":
            self.lora.lora_A = Factor(r, fan_in[0] // n, *fan_in[1:])
        elif self.side == "b":
            self.lora.lora_B = Factor(out, r // n, *[1] * (len(fan_in) - 1))
        self.restart(cfg, site)
        if self.side == "a" and cfg.init_lora_weights is True and site.kind != "embedding":
            nn.init.kaiming_uniform_(self.lora.lora_A.weight, generator=site.generator("lora_A"))

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return self.diagonal(A) if self.side == "a" else A, self.diagonal(B) if self.side == "b" else B

    def diagonal(self, m: Tensor) -> Tensor:
        """(rows, columns / n, ...) as the (rows, columns, ...) that it stands for."""
        own = torch.eye(self.n).to(m).view(self.n, 1, self.n, *[1] * (m.dim() - 1))
        return (m.unflatten(0, (self.n, -1)).unsqueeze(2) * own).flatten(2, 3).flatten(0, 1)

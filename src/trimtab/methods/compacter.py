"""Compacter: a bottleneck adapter whose matrices are sums of Kronecker products with low-rank parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Site, seeded
from trimtab.core.config import in_range, method, one_of, option
from trimtab.errors import NotSupported
from trimtab.methods._blocks import NON_LINEAR, Around, BlockConfig


@dataclass(kw_only=True)
class CompacterConfig(BlockConfig):
    reduction_factor: float = option(32.0, "width of the block over that of the bottleneck")
    non_linearity: str = option("gelu", f"one of {', '.join(NON_LINEAR)}")
    phm_dim: int = option(4, "n: how many products, and the size of their left sides")
    phm_rank: int = option(1, "rank of their right sides")
    phm_bias: bool = option(True, "add a bias behind each matrix")
    shared_phm_rule: bool = option(True, "all matrices of the model have the same left sides")
    learn_phm: bool = option(True, "train the left sides")
    phm_init_range: float = option(1e-4, "standard deviation of the left sides at the start")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("phm_dim", "phm_rank"):
            in_range(name, getattr(self, name), 1)
        in_range("reduction_factor", self.reduction_factor, 1e-3)
        one_of("non_linearity", self.non_linearity, list(NON_LINEAR))


class Rule(nn.Module):
    """A, (n, n, n); frozen as a buffer."""

    phm_rule: Tensor

    def __init__(self, cfg: CompacterConfig, key: str) -> None:
        super().__init__()
        rule = torch.empty(cfg.phm_dim, cfg.phm_dim, cfg.phm_dim)
        nn.init.normal_(rule, std=cfg.phm_init_range, generator=seeded(key))
        if cfg.learn_phm:
            self.phm_rule = nn.Parameter(rule)
        else:
            self.register_buffer("phm_rule", rule)


class Product(nn.Module):
    """x H + b,  H (in, out) = sum_i A_i kron (L_i R_i)"""

    def __init__(self, cfg: CompacterConfig, inn: int, out: int, site: Site, name: str) -> None:
        super().__init__()
        n, r = cfg.phm_dim, cfg.phm_rank
        self.W_left, self.W_right = nn.Parameter(torch.empty(n, inn // n, r)), nn.Parameter(torch.empty(n, r, out // n))
        self.b = nn.Parameter(torch.zeros(out)) if cfg.phm_bias else None
        for side in ("W_left", "W_right"):
            for i, part in enumerate(getattr(self, side)):
                nn.init.xavier_normal_(part.data, generator=site.generator(f"{name}.{side}.{i}"))
        self.rule = None if cfg.shared_phm_rule else Rule(cfg, f"{site.adapter}/{site.name}/{name}")

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        A, x = rule if self.rule is None else self.rule.phm_rule, x.unflatten(-1, (len(rule), -1))
        left = torch.einsum("...ak,ikr->...air", x, self.W_left)
        y = torch.einsum("...air,iac,iro->...co", left, A, self.W_right).flatten(-2)
        return y if self.b is None else y + self.b


@method("COMPACTER", config=CompacterConfig, small={"reduction_factor": 2, "phm_dim": 2, "phm_init_range": 0.3})
class Compacter(Around):
    """y' = y + s (act(z H_D + d) H_U + u),  H = sum_i A_i kron (L_i R_i),  i = 1 .. n                arXiv:2106.04647, eq. 5

    A_i (n, n), one set for the whole model; L_i (in / n, rank), R_i (rank, out / n). mh_adapter=False,
    original_ln_before=True: Compacter++.
    """

    starts_at_base = False

    def __init__(self, cfg: CompacterConfig, site: Site) -> None:
        super().__init__(cfg, site)
        n = cfg.phm_dim
        if self.out % n or self.inn % n:
            raise NotSupported(f"Compacter on {site.name!r}: phm_dim={n} does not divide its widths {self.inn} and {self.out}")
        size = n * max(1, math.ceil(self.out // cfg.reduction_factor / n))
        self.shared = site.shared
        self.adapter_down = Product(cfg, self.inn, size, site, "adapter_down")
        self.adapter_up = Product(cfg, size, self.out, site, "adapter_up")
        self.names = {f"adapter_{way}.rule.": f"adapter_{way}." for way in ("down", "up")}

    @classmethod
    def share(cls, cfg: CompacterConfig, sites: Sequence[Site]) -> nn.Module | None:
        return Rule(cfg, f"{sites[0].adapter}/phm_rule") if cfg.shared_phm_rule else None

    def change(self, z: Tensor) -> Tensor:
        down, up, z = self.adapter_down, self.adapter_up, z.to(self.adapter_down.W_left.dtype)
        rules = [self.shared.phm_rule] * 2 if self.shared is not None else [p.rule.phm_rule for p in (down, up)]  # type: ignore[union-attr]
        return up(self.non_linear(down(z, rules[0])), rules[1])

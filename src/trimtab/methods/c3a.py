"""C3A: the change of the weight is made of circulant blocks, so that it costs a Fourier transform."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Layers, Targets, in_range, method, one_of, option
from trimtab.errors import NotSupported
from trimtab.methods._low_rank import precise
from trimtab.targets import TARGETS


@dataclass(kw_only=True)
class C3AConfig(Targets, Layers, Biases):
    block_size: int = option(256, "size of a block; it divides inputs and outputs")
    block_size_pattern: dict[str, int] = option(dict, "block_size by layer name or regex")
    init_weights: bool | str = option(
        "xavier_uniform",
        "true: start as the base; else xavier_uniform (false too), kaiming_uniform or gaussian",
        choices=("gaussian", "kaiming_uniform"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("block_size", self.block_size, 1)
        one_of("init_weights", self.init_weights, [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])


@method("C3A", config=C3AConfig, small={"block_size": 4, "init_weights": True})
class C3A(Adapter):
    """W' = W + C / in,  C of blocks C_pq[m, j] = k_pq[(j - m) mod B]                                  arXiv:2407.19342

    k (out / B, in / B, B). The product with a block is a circular correlation: C_pq x = irfft(rfft(x) conj(rfft(k_pq))).
    """

    additive = True
    targets = TARGETS | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

    def __init__(self, cfg: C3AConfig, site: Site) -> None:
        super().__init__()
        site.need("C3A", "linear", "conv")  # token ids stand in no circle
        self.inn, out, B = math.prod(site.shape[1:]), site.shape[0], site.pick(cfg.block_size_pattern, cfg.block_size)
        if self.inn % B or out % B:
            raise NotSupported(
                f"C3A on {site.name!r}: block_size={B} does not divide its {self.inn} inputs and {out} outputs"
            )
        self.point, self.starts_at_base = site.kind == "linear", cfg.init_weights is True
        self.c3a_kernel = nn.Parameter(torch.zeros(out // B, self.inn // B, B))
        draw = site.generator("c3a_kernel")
        if cfg.init_weights == "gaussian":
            nn.init.normal_(self.c3a_kernel, generator=draw)
        elif not self.starts_at_base:
            a = (1 / self.inn if cfg.init_weights == "kaiming_uniform" else 6 / (self.inn + out)) ** 0.5
            nn.init.uniform_(self.c3a_kernel, -a, a, generator=draw)

    def weight(self, w: Tensor) -> Tensor:
        k, at = self.c3a_kernel, torch.arange(self.c3a_kernel.shape[-1], device=w.device)
        C = k[..., (at - at[:, None]) % len(at)].transpose(1, 2)  # (out / B, B, in / B, B)
        return w + C.reshape_as(w) / self.inn

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.point:
            return super().forward(x, base)
        k = precise(self.c3a_kernel)
        blocks = torch.fft.rfft(x.to(k.dtype).unflatten(-1, k.shape[1:]))  # (..., in / B, B / 2 + 1)
        y = torch.einsum("...qf,pqf->...pf", blocks, torch.fft.rfft(k).conj())
        return base(x) + torch.fft.irfft(y, k.shape[-1]).flatten(-2) / self.inn

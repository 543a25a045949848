"""VeLoRA: a LoRA that keeps, of its input, one number a group of features for the gradient of A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.adapter import Site
from trimtab.core.base import Base
from trimtab.core.config import in_range, method, one_of, option
from trimtab.errors import ConfigError
from trimtab.methods._variant import Variant
from trimtab.methods.lora import LoraConfig

_STARTS = ["batch_average", "batch_average_once", "random"]


@dataclass
class VeloraConfig:
    num_groups: int = option(64, "groups of features; each is kept as one number a token")
    scale: float = option(1.0, "factor of the gradient that comes out")
    init_type: str = option("batch_average", "v: the mean of each batch, of the first one, or random")

    def __post_init__(self) -> None:
        in_range("num_groups", self.num_groups, 1)
        one_of("init_type", self.init_type, _STARTS)
        if not self.scale > 0:
            raise ConfigError(f"scale={self.scale!r}: it is above 0")


class Compressed(torch.autograd.Function):
    """h = x A^T;  dA = scale (dh^T c) v^T,  c = <groups of x, v> (tokens, n),  v (ceil(in / n))"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, n: int, scale: float) -> Tensor:
        ctx.save_for_backward(groups(x, n) @ v, A, v)
        ctx.scale = scale
        return F.linear(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        c, A, v = ctx.saved_tensors
        dh = grads[0].to(A.dtype)  # of lower precision under autocast
        dx = dh @ A if ctx.needs_input_grad[0] else None
        dA = dh.reshape(-1, dh.shape[-1]).T @ c.to(A.dtype)  # (r, n)
        return dx, ctx.scale * (dA[..., None] * v).flatten(1)[:, : A.shape[1]], None, None, None


def groups(x: Tensor, n: int) -> Tensor:
    """(tokens, n, ceil(in / n)): the features of each token in n groups, the last ones filled with zeros."""
    size = -(-x.shape[-1] // n)
    return F.pad(x, (0, n * size - x.shape[-1])).reshape(-1, n, size)


def direction(v: Tensor) -> Tensor:
    length = v.norm()
    return torch.where(length > 0, v / length, len(v) ** -0.5)


@method("LORA", config=LoraConfig, small={"r": 4, "velora_config": {"num_groups": 4}}, switch="velora_config")
class VeLoRA(Variant):
    """W' = W + s B A,  dL/dA ~ scale sum_t (dL/dh_t) (c_t v^T)                              arXiv:2405.17991, eq. 1 and 2

    h_t = A x_t, and c_t (n) = <groups of x_t, v> is all that is kept of x_t. v (in / n): the mean group of the batch, at length
    1, in the file. Without gradients, and in eval mode, nothing is estimated.
    """

    noisy, remembers = True, ("lora_velora_embed",)
    lora_velora_embed: Tensor

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        site.need("VeLoRA", "linear")
        super().__init__(cfg, site)
        self.cfg: VeloraConfig = cfg.velora_config
        size = -(-site.shape[1] // self.cfg.num_groups)
        v = torch.randn(size, generator=site.generator("lora_velora_embed"))
        self.register_buffer("lora_velora_embed", direction(v) if self.cfg.init_type == "random" else torch.zeros(size))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x, base)
        A, B = self.factors()
        z = self.lora.drop(x).to(A.dtype)
        h = Compressed.apply(z, A, self.follow(z.detach()), self.cfg.num_groups, self.cfg.scale)
        return self.lora.plus(base(x), h, base, B)  # type: ignore[arg-type]

    @torch.no_grad()
    def follow(self, x: Tensor) -> Tensor:
        """v for this batch."""
        v, start = self.lora_velora_embed, self.cfg.init_type
        if start != "random":
            mean = direction(groups(x, self.cfg.num_groups).mean((0, 1)))
            self.lora_velora_embed.copy_(torch.where(v.any(), v, mean) if start == "batch_average_once" else mean)
        return v.clone()  # the next forward may come before this one's backward

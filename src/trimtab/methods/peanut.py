"""PEANuT: the update is a small network of the frozen weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import Excludes, Layers, Targets, in_range, method, one_of, option
from trimtab.methods._low_rank import kaiming, product

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.leaky_relu(x, 0.25),
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5))),
}
for _name in ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"):
    _ACTIVATIONS[_name] = lambda x: F.gelu(x, approximate="tanh")


@dataclass(kw_only=True)
class PeanutConfig(Targets, Excludes, Layers):
    r: int = option(32, "width of the network")
    depth: int = option(0, "pairs of inner layers")
    act_fn: str = option("relu", "activation, by its usual name")
    scaling: float = option(1.0, "the update is scaled by it")
    init_weights: bool = option(True, "true: the last layer zero; false: all random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("depth", self.depth, 0)
        one_of("act_fn", self.act_fn, list(_ACTIVATIONS))


@method("PEANUT", config=PeanutConfig, small={"r": 4})
class PEANuT(Adapter):
    """W' = W + s B N(A W),  N = f, or h_0 = f, h_i = f(E_i h_i-1), then h = f(D_j h) + h_d-j            arXiv:2410.01870

    A (r, out), B (out, r), which starts at 0; E_i and D_j (r, r), `depth` of each, for i = 1 .. d, j = 1 .. d.
    """

    def __init__(self, cfg: PeanutConfig, site: Site) -> None:
        super().__init__()
        site.need("PEANuT", "linear", "embedding", "conv")
        out, self.s, self.act = site.shape[0], cfg.scaling, cfg.act_fn
        self.peanut_A, self.peanut_B = Factor(cfg.r, out), Factor(out, cfg.r)
        self.peanut_encoders = nn.ModuleList(Factor(cfg.r, cfg.r) for _ in range(cfg.depth))
        self.peanut_decoders = nn.ModuleList(Factor(cfg.r, cfg.r) for _ in range(cfg.depth))
        for name, tensor in self.named_parameters():
            if name != "peanut_B.weight" or not cfg.init_weights:
                kaiming(tensor, site, name)

    def code(self, w: Tensor) -> Tensor:
        """N(A W) (r, in * kernel)."""
        f, A = _ACTIVATIONS[self.act], self.peanut_A.weight
        h, kept = f(A @ w.flatten(1).to(A.dtype)), []
        for encoder in self.peanut_encoders:
            kept.append(h)
            h = f(encoder.weight @ h)  # type: ignore[operator]
        for decoder in self.peanut_decoders:
            h = f(decoder.weight @ h) + kept.pop()  # type: ignore[operator]
        return h

    def weight(self, w: Tensor) -> Tensor:
        return w + self.s * (self.peanut_B.weight @ self.code(w)).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + self.s * product(x, base, self.code(base.weight()), self.peanut_B.weight)

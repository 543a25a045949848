"""GLoRA: weight and bias each scaled and shifted, by matrices of low rank, vectors or numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, Tensors
from trimtab.core.config import Biases, Targets, in_range, method, one_of, option
from trimtab.methods._low_rank import kaiming

if TYPE_CHECKING:
    from trimtab.core.group import Group


@dataclass(kw_only=True)
class GloraConfig(Targets, Biases):
    r: int = option(8, "rank of the paths of low rank")
    config_A_B: str = option("lora", "form of A and B, on the weight: lora, vector, constant, none")
    config_C: str = option("lora", "form of C, from the weight to the bias: lora, vector, none")
    config_D_E: str = option("constant", "form of D and E, on the bias: vector, constant, none")
    init_weights: bool = option(True, "true: no change at the start; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        one_of("config_A_B", self.config_A_B, ["lora", "vector", "constant", "none"])
        one_of("config_C", self.config_C, ["lora", "vector", "none"])
        one_of("config_D_E", self.config_D_E, ["vector", "constant", "none"])


def sizes(form: str, shape: tuple[int, ...], r: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a path that stands for a matrix or a vector of this shape."""
    if form == "lora":
        return {"Xd": (shape[0], r), "Xu": (r, shape[1])}
    return {"vector": {"X": (shape[0], *[1] * (len(shape) - 1))}, "constant": {"X": (1,)}, "none": {}}[form]


@method("GLORA", config=GloraConfig, small={"r": 4})
class GLoRA(Adapter):
    """W' = W + W ∘ A + B,  b' = b + D ∘ b + E + W C                                             arXiv:2306.07967

    A, B: X_d (out, r) X_u (r, in), or X (out, 1), or X (1). C: X_d (in, r) X_u (r, 1), or X (in, 1). D, E: X (out), or X (1).
    X_d and X start at 0. A layer without bias has A and B alone, and a path that is `none` has no tensors: published files
    hold zeros for both.
    """

    def __init__(self, cfg: GloraConfig, site: Site) -> None:
        super().__init__()
        site.need("GLoRA", "linear", "embedding", "conv")
        out, inn, biased = site.shape[0], math.prod(site.shape[1:]), site.base.bias() is not None
        paths = [("A", cfg.config_A_B, (out, inn)), ("B", cfg.config_A_B, (out, inn))]
        if biased:
            paths += [("C", cfg.config_C, (inn, 1)), ("D", cfg.config_D_E, (out,)), ("E", cfg.config_D_E, (out,))]
        for letter, form, shape in paths:
            path = {name: nn.Parameter(torch.zeros(size)) for name, size in sizes(form, shape, cfg.r).items()}
            for name, tensor in path.items():
                if name == "Xu" or not cfg.init_weights:
                    kaiming(tensor.data.view(-1, tensor.shape[-1]), site, f"glora_{letter}.{name}")
            self.add_module(f"glora_{letter}", nn.ParameterDict(path))

    def path(self, letter: str) -> Tensor | float:
        own = self._modules.get(f"glora_{letter}") or {}
        return own["Xd"] @ own["Xu"] if "Xd" in own else own["X"] if "X" in own else 0.0  # type: ignore[operator,index]

    def weight(self, w: Tensor) -> Tensor:
        flat = w.flatten(1)
        return (flat + flat * self.path("A") + self.path("B")).view_as(w)

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        if b is None:
            return None
        shift = self.path("C")
        if isinstance(shift, Tensor):
            shift = (w.flatten(1).to(shift.dtype) @ shift)[:, 0]
        return b + b * self.path("D") + self.path("E") + shift

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        return {key: t for key, t in tensors.items() if not (key[1].endswith(".zeros") and not t.any())}

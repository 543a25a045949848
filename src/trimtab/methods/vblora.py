"""VB-LoRA: low-rank factors put together from a bank of vectors that all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, Tensors, seeded
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, in_range, method, option
from trimtab.errors import NotSupported
from trimtab.methods._low_rank import WIDE, dropout, product

if TYPE_CHECKING:
    from trimtab.core.group import Group


@dataclass(kw_only=True)
class VBLoRAConfig(Targets, Excludes, Layers, Biases, FanIn):
    r: int = option(4, "rank")
    num_vectors: int = option(256, "vectors in the bank")
    vector_length: int = option(256, "their length; it divides inputs and outputs")
    topk: int = option(2, "vectors that are mixed for each part of a factor")
    save_only_topk_weights: bool = option(False, "a small file, for inference alone", apart=True)
    vblora_dropout: float = option(0.0, "dropout on the input of the product")
    init_vector_bank_bound: float = option(0.02, "the bank starts uniform between minus this and this")
    init_logits_std: float = option(0.1, "standard deviation of the logits at the start")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("topk", self.topk, 1, self.num_vectors)
        in_range("vector_length", self.vector_length, 1)
        in_range("vblora_dropout", self.vblora_dropout, 0, 1)


class Bank(nn.Module):
    def __init__(self, cfg: VBLoRAConfig, adapter: str) -> None:
        super().__init__()
        bank, bound = torch.empty(cfg.num_vectors, cfg.vector_length), cfg.init_vector_bank_bound
        self.vblora_vector_bank = nn.Parameter(bank.uniform_(-bound, bound, generator=seeded(f"{adapter}/vector_bank")))


@method("VBLORA", config=VBLoRAConfig, small={"r": 2, "num_vectors": 6, "vector_length": 4})
class VBLoRA(Adapter):
    """W' = W + B A,  each part of length L of A's rows and B's columns = sum_k softmax(top_k logits) v_k    arXiv:2405.15179

    logits_A (r, in / L, h), logits_B (out / L, r, h), and a bank v (h, L) that all sites train together. Nothing starts at 0.
    `save_only_topk_weights`: the file holds which vectors are mixed and how, which cannot be trained on.
    """

    additive, starts_at_base, targets = True, False, WIDE

    def __init__(self, cfg: VBLoRAConfig, site: Site) -> None:
        super().__init__()
        self.shared: Any = site.shared
        out, inn, length = site.shape[0], math.prod(site.shape[1:]), cfg.vector_length
        if out % length or inn % length:
            raise NotSupported(f"VB-LoRA on {site.name!r}: vector_length={length} does not divide the layer's ({out}, {inn})")
        self.k, self.drop = cfg.topk, dropout(cfg.vblora_dropout, site)
        self.vblora_logits_A = nn.Parameter(torch.empty(cfg.r, inn // length, cfg.num_vectors))
        self.vblora_logits_B = nn.Parameter(torch.empty(out // length, cfg.r, cfg.num_vectors))
        for name, tensor in (("vblora_logits_A", self.vblora_logits_A), ("vblora_logits_B", self.vblora_logits_B)):
            nn.init.normal_(tensor, std=cfg.init_logits_std, generator=site.generator(name))

    @classmethod
    def share(cls, cfg: VBLoRAConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:
            site.need("VB-LoRA", "linear", "embedding", "conv")
        return Bank(cfg, sites[0].adapter)

    def mixed(self, logits: Tensor) -> Tensor:
        top, which = logits.topk(self.k, dim=-1)
        return (top.softmax(-1)[..., None] * self.shared.vblora_vector_bank[which]).sum(-2)  # (..., L)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.mixed(self.vblora_logits_A), self.mixed(self.vblora_logits_B)
        return A.flatten(1), B.mT.flatten(0, 1)  # (r, in), (out, r)

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.factors()
        return w + (B @ A).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + product(self.drop(x), base, *self.factors())

    @classmethod
    def pack(cls, group: Group, tensors: Tensors) -> Tensors:
        cfg: Any = group.config
        if not cfg.save_only_topk_weights:
            return tensors
        kind = next(d for d in (torch.uint8, torch.int16, torch.int32) if cfg.num_vectors <= torch.iinfo(d).max)
        packed = {k: t for k, t in tensors.items() if not k[1].startswith("vblora_logits")}
        for (path, name), t in ((k, t) for k, t in tensors.items() if k not in packed):
            top, which = t.topk(cfg.topk, dim=-1)
            packed[path, f"{name}_topk_indices"] = which.to(kind)
            packed[path, f"{name}_topk_weights"] = top.softmax(-1)[..., :-1]  # the last one is what is left of 1
        return packed

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        cfg: Any = group.config
        given = {k: t for k, t in tensors.items() if not k[1].endswith(("_topk_indices", "_topk_weights"))}
        if len(given) < len(tensors) and not cfg.inference_mode:
            raise NotSupported("a VB-LoRA file with the top k weights alone is for inference: other vectors are out of reach")
        for (path, name), which in tensors.items():
            weights = tensors.get((path, name.replace("indices", "weights")))
            if name.endswith("_topk_indices") and weights is not None:
                weights = torch.cat([weights, (1 - weights.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
                logits = weights.new_full((*which.shape[:-1], cfg.num_vectors), -torch.inf)
                given[path, name.removesuffix("_topk_indices")] = logits.scatter(-1, which.long(), weights.log())
        return given

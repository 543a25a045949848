"""AdaLoRA: low-rank updates in singular value form, whose ranks are taken from where they matter least."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, Tensors
from trimtab.core.base import Base
from trimtab.core.config import in_range, method, one_of, option
from trimtab.core.group import Group
from trimtab.errors import ConfigError, TrimtabWarning
from trimtab.methods._budget import best, observe, score, track
from trimtab.methods._low_rank import WIDE, dropout, product
from trimtab.methods.lora import LoraConfig

_USED = {"r", "lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern"}  # of LoRA's own options


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    target_r: int = option(8, "mean rank of a layer at the end")
    init_r: int = option(12, "rank of each layer at the start")
    tinit: int = option(0, "steps before ranks are taken")
    tfinal: int = option(0, "steps at the end in which the ranks stay")
    deltaT: int = option(1, "ranks are taken every so many steps")
    beta1: float = option(0.85, "smoothing of the importance")
    beta2: float = option(0.85, "smoothing of its uncertainty")
    orth_reg_weight: float = option(0.5, "weight of the penalty that keeps the factors orthogonal")
    total_step: int | None = option(None, "steps of the whole run; it must be given")
    rank_pattern: dict[str, list[bool]] | None = option(None, "which ranks were kept, by tensor: written by training")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        plain, common = vars(LoraConfig()), {f.name for base in LoraConfig.__bases__ for f in fields(base)}
        if odd := sorted(n for n in plain.keys() - common - _USED if getattr(self, n) != plain[n]):
            raise ConfigError(f"AdaLoRA has no {odd[0]}")
        one_of("init_lora_weights", self.init_lora_weights, [True, False])
        if self.r != plain["r"]:
            warnings.warn(f"AdaLoRA does not read r={self.r}: its ranks are init_r and target_r", TrimtabWarning)
        in_range("target_r", self.target_r, 0, self.init_r)
        in_range("orth_reg_weight", self.orth_reg_weight, 0)
        if self.total_step is None or self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(f"total_step={self.total_step}: the steps of the run are needed, more than tinit + tfinal")


@method("ADALORA", config=AdaLoraConfig, small={"init_r": 4, "target_r": 2, "total_step": 10})
class AdaLoRA(Adapter):
    """W' = W + s B diag(E) A,  s = alpha / (init_r + 1e-5)                                                arXiv:2303.10512

    A (r, in * kernel) and B (out, r) start random, E (r) at 0. The penalty is the mean |A A^T - 1|, |B^T B - 1| of all layers.
    Each step, importance |p dL/dp| and its uncertainty are averaged; of all triplets of the model as many as the budget of the
    step allows keep their E, those with the highest score, and the others' E is set to 0. Files hold the ones that are kept.
    """

    additive, targets = True, WIDE | {"roberta": ["query", "key", "value", "dense"]}

    def __init__(self, cfg: AdaLoraConfig, site: Site) -> None:
        super().__init__()
        site.need("AdaLoRA", "linear", "embedding", "conv")
        out, inn, kept = site.shape[0], math.prod(site.shape[1:]), (cfg.rank_pattern or {}).get(f"{site.name}.lora_E")
        r = cfg.init_r if kept is None else sum(kept)
        self.s = (cfg.lora_alpha if cfg.lora_alpha > 0 else cfg.init_r) / (cfg.init_r + 1e-5)
        std = 0.02 if cfg.init_lora_weights else 1.0
        self.lora_A = nn.Parameter(std * torch.randn(r, inn, generator=site.generator("lora_A")))
        self.lora_E = nn.Parameter(torch.zeros(r, 1) if cfg.init_lora_weights else torch.ones(r, 1))
        self.lora_B = nn.Parameter(std * torch.randn(out, r, generator=site.generator("lora_B")))
        self.drop = dropout(cfg.lora_dropout, site)
        if kept is None and not cfg.inference_mode:  # ranks can be taken
            self.register_buffer("kept", torch.ones(r, dtype=torch.bool), persistent=False)
            self.remembers = ("kept", *track(self))

    def weight(self, w: Tensor) -> Tensor:
        return w + self.s * (self.lora_B @ (self.lora_E * self.lora_A)).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x) + self.s * product(self.drop(x), base, self.lora_E * self.lora_A, self.lora_B)

    @classmethod
    def penalty(cls, group: Group) -> Tensor | None:
        cfg: Any = group.config
        parts = [a for _, a in group.each(cls) if a.lora_A.requires_grad]
        errors = [(m - torch.eye(len(m)).to(m)).norm() for a in parts for m in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
        return cfg.orth_reg_weight * sum(errors) / len(errors) if errors and cfg.orth_reg_weight else None

    @classmethod
    @torch.no_grad()
    def step(cls, group: Group, step: int) -> None:
        cfg: Any = group.config
        parts = [a for _, a in group.each(cls) if a.remembers and a.lora_A.requires_grad]
        end, first, last = cfg.total_step - cfg.tfinal, cfg.init_r * len(parts), cfg.target_r * len(parts)
        for part in parts if step < end else ():
            observe(part, dict(part.named_parameters()), cfg.beta1, cfg.beta2, first="mean")
        if not parts or step <= cfg.tinit or (step < end and step % cfg.deltaT):
            return
        triplets = ([score(part, name) for name, _ in part.named_parameters()] for part in parts)
        scores = torch.cat([A.mean(1) + E[:, 0] + B.mean(0) for A, E, B in triplets])
        count = int((first - last) * max(0.0, (end - step) / (end - cfg.tinit)) ** 3 + last)
        for part, kept in zip(parts, best(scores, count).split(cfg.init_r), strict=True):
            part.kept.copy_(kept)
            part.lora_E.masked_fill_(~part.kept[:, None], 0)

    @classmethod
    def pack(cls, group: Group, tensors: Tensors) -> Tensors:
        """Without what is taken: rows that are not kept and whose E is 0, so the file says what the adapter does."""
        parts = {path: (tensors[path, "lora_E"][:, 0] != 0) | a.kept for path, a in group.each(cls) if a.remembers}
        taken = {f"{path}.lora_E": kept.tolist() for path, kept in parts.items() if not all(k.all() for k in parts.values())}
        if parts:  # what an earlier file held does not count: ranks may have come back since
            group.config.rank_pattern = taken or None  # type: ignore[attr-defined]
            for path, kept in parts.items() if taken else ():
                for name in ("lora_A", "lora_E", "lora_B"):
                    tensors[path, name] = tensors[path, name][:, kept] if name == "lora_B" else tensors[path, name][kept]
        return tensors

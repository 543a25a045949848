"""Poly: an inventory of small LoRAs, of which each task mixes its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

from trimtab.call import Call
from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Excludes, Targets, in_range, method, one_of, option
from trimtab.core.group import Group
from trimtab.errors import ConfigError, NotMergeable, NotSupported
from trimtab.methods._low_rank import kaiming


@dataclass(kw_only=True)
class PolyConfig(Targets, Excludes):
    r: int = option(8, "rank of a skill")
    poly_type: str = option("poly", "how tasks choose: poly is all there is")
    n_tasks: int = option(1, "number of tasks; with more than one, each call brings task_ids")
    n_skills: int = option(4, "skills in the inventory of a layer")
    n_splits: int = option(1, "parts of the input and of the output that choose apart (multi-head routing)", choices=(2,))
    init_weights: bool = option(True, "true: A random, B zero; false: both random")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("poly_type", self.poly_type, ["poly"])
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            in_range(name, getattr(self, name), 1)


class Router(nn.Module):
    """Z (n_tasks, n_splits * n_skills) under its published name."""

    def __init__(self, cfg: PolyConfig, site: Site) -> None:
        super().__init__()
        self.module_logits = nn.Parameter(torch.zeros(cfg.n_tasks, cfg.n_splits * cfg.n_skills))
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3, generator=site.generator("module_logits"))


@method("POLY", config=PolyConfig, small={"r": 4})
class Poly(Adapter):
    """y = W x + B A x / r,  A = sum_e p_e A_e,  B = sum_e p_e B_e,  p = z / sum z      arXiv:2202.13914, eq. 2; 2211.03831

    z = sigmoid(Z[task]), in training a draw from the relaxed Bernoulli distribution of these odds. The inputs, and the outputs,
    come in `n_splits` parts, each of which has its own p. `task_ids` has the task of each row.
    A_e (n_splits, n_skills, in / n_splits, r) random and B_e (n_splits, n_skills, r, out / n_splits) from 0, as published.
    """

    routed, noisy, takes = True, True, ("task_ids",)

    def __init__(self, cfg: PolyConfig, site: Site) -> None:
        super().__init__()
        site.need("Poly", "linear")
        out, inn = site.shape
        if inn % cfg.n_splits or out % cfg.n_splits:
            raise NotSupported(f"Poly: {cfg.n_splits} splits do not divide {site.name!r}, which is {out} x {inn}")
        self.cfg, self.site, self.call, self.adapter = cfg, site.name, site.call, site.adapter
        a = torch.empty(cfg.n_splits, cfg.n_skills, cfg.r, inn // cfg.n_splits)
        kaiming(a.view(-1, a.shape[-1]), site, "poly_lora_A")
        b = torch.zeros(cfg.n_splits, cfg.n_skills, out // cfg.n_splits, cfg.r)
        if not cfg.init_weights:
            kaiming(b.view(-1, cfg.r), site, "poly_lora_B")
        self.poly_lora_A, self.poly_lora_B = nn.Parameter(a.mT.contiguous()), nn.Parameter(b.mT.contiguous())
        self.poly_router = Router(cfg, site)

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("Poly mixes its skills by the task of each row: it has no weight to merge, or to read")

    def forward(self, x: Tensor, base: Base) -> Tensor:
        tasks = self.call.get(self.adapter)
        if tasks is None:  # there is one task; in training each row has a draw of its own
            tasks = torch.zeros(len(x) if self.training else 1, dtype=torch.long)
        else:
            self.call.check(x, len(tasks), self.site)
        z = self.poly_router.module_logits[tasks.to(x.device)].unflatten(1, (self.cfg.n_splits, -1))  # (rows, splits, skills)
        z = RelaxedBernoulli(x.new_ones((), dtype=z.dtype), logits=z).rsample() if self.training else z.sigmoid()
        p = z / (z.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("bqs,qsdr->bqdr", p, self.poly_lora_A).flatten(1, 2)  # (rows, in, r)
        B = torch.einsum("bqs,qsrd->brqd", p, self.poly_lora_B).flatten(2)  # (rows, r, out)
        y = base(x)
        u = x.reshape(len(x), -1, x.shape[-1]).to(A.dtype)
        for m in (A, B):  # a matmul of its own choice would round otherwise where nothing is trained
            u = torch.bmm(u, m.expand(len(x), -1, -1))
        return y + (u / self.cfg.r).view_as(y)

    @classmethod
    def enter(cls, group: Group, call: Call, given: dict[str, Any]) -> Tensor | None:
        config: Any = group.config
        ids = call.asked.get("task_ids")
        if ids is None:
            if config.n_tasks > 1:
                raise ConfigError(f"Poly {group.name!r} has {config.n_tasks} tasks: task_ids says which one each row is of")
            return None
        ids = torch.as_tensor(ids)
        if ids.shape != (call.size,) or ids.is_floating_point() or ids.min() < 0 or ids.max() >= config.n_tasks:
            raise ConfigError(
                f"task_ids {ids.tolist()}: for {call.size} rows it has as many whole numbers from 0 to {config.n_tasks - 1}"
            )
        return ids

"""Arrow: each token goes through the LoRAs whose updates stretch it most. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import in_range, method
from trimtab.errors import ConfigError, NotMergeable
from trimtab.methods._experts import Experts
from trimtab.methods.lora import LoRA, LoraConfig


@dataclass
class ArrowConfig:
    """What `arrow_config` of a LoraConfig holds. `create_arrow_model` writes the names."""

    top_k: int = 3  # experts of a token
    router_temperature: float = 1.0
    use_gks: bool = False  # take the mean of the general adapters from the factors of each expert (GenKnowSub)
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None  # of the vector that the power iteration starts from

    def __post_init__(self) -> None:
        in_range("top_k", self.top_k, 1)
        if not self.router_temperature > 0:
            raise ConfigError(f"router_temperature={self.router_temperature!r}: it is above 0")


@method("LORA", config=LoraConfig, small={"r": 4, "arrow_config": {"top_k": 2}}, switch="arrow_config")
class Arrow(Adapter):
    """y = W x + sum_e p_e s_e B_e A_e x,  p = softmax of the top k of |v_e . x| / T                      arXiv:2405.11157

    v_e is the top right singular vector of B_e A_e, by 15 steps of power iteration from one random vector. With `use_gks` the
    factors are A_e - mean A_g and B_e - mean B_g over general adapters g (aclanthology.org/2025.acl-short.54). Experts stay as
    they are. The adapter's own A and B are in published files and do nothing. Dropout acts on the sum.
    """

    routed, among = True, True

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__()
        site.need("Arrow", "linear")
        self.settings = settings = cfg.arrow_config
        names, general = settings.task_adapter_names or [], settings.gks_adapter_names or []
        if not names or (settings.use_gks and not general):
            what = "task_adapter_names" if not names else "gks_adapter_names, which use_gks subtracts"
            raise ConfigError(f"Arrow on {site.name!r}: no {what}. create_arrow_model() loads adapters and writes their names")
        self.experts, self.general = Experts(site, names, "Arrow"), Experts(site, general if settings.use_gks else [], "Arrow")
        in_range("top_k", settings.top_k, 1, len(names))
        if len(ranks := {e.lora_A.weight.shape[0] for e in self.experts() + self.general()}) > 1:
            raise ConfigError(f"Arrow on {site.name!r}: experts have one rank, not {', '.join(map(str, sorted(ranks)))}")
        seed = settings.rng_seed
        draw = site.generator("arrow") if seed is None else torch.Generator().manual_seed(seed)
        self.register_buffer("start", torch.randn(site.shape[1], generator=draw), persistent=False)
        self.lora, self.names = LoRA(cfg, site), {"lora.": ""}
        self.seen: tuple[Any, Tensor | None] = (None, None)  # which factors, and their prototypes

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("Arrow chooses experts token by token: it has no weight to merge, or for a method after it to read")

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (experts, r, in) and B (experts, out, r)."""
        A, B = (torch.stack([getattr(e, n).weight for e in self.experts()]) for n in ("lora_A", "lora_B"))
        if self.general.names:
            A = A - torch.stack([g.lora_A.weight for g in self.general()]).mean(0)
            B = B - torch.stack([g.lora_B.weight for g in self.general()]).mean(0)
        return A, B

    @torch.no_grad()
    def prototypes(self, A: Tensor, B: Tensor) -> Tensor:
        """v (experts, in), made again when a factor has changed."""
        own = [p for e in self.experts() + self.general() for p in e.parameters()]
        state = [(p.data_ptr(), p._version) for p in own]
        if self.seen[0] != state:
            A, B = A.float(), B.float()
            v = self.start.float().expand(len(A), -1)  # type: ignore[operator]
            for _ in range(15):
                v = v / (v.norm(dim=1, keepdim=True) + 1e-8)
                v = (A.mT @ (B.mT @ B @ (A @ v[..., None])))[..., 0]
            self.seen = state, (v / (v.norm(dim=1, keepdim=True) + 1e-8))
        assert self.seen[1] is not None
        return self.seen[1]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B = self.factors()
        u = x.to(A.dtype)
        likeness, chosen = (u @ self.prototypes(A, B).to(u).T).abs().topk(self.settings.top_k, dim=-1)
        p = (likeness / self.settings.router_temperature).softmax(-1)
        p = u.new_zeros(*u.shape[:-1], len(A)).scatter(-1, chosen, p) * u.new_tensor([e.s for e in self.experts()])
        h = (u @ A.flatten(0, 1).T).unflatten(-1, A.shape[:2]) * p[..., None]  # (..., experts, r)
        return base(x) + self.lora.drop(h.flatten(-2) @ B.movedim(0, 1).flatten(1).T)

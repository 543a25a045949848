"""MonteCLoRA: a LoRA whose A is trained under noise of a learned size, the mean of draws with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from trimtab.core.adapter import Site
from trimtab.core.base import Base
from trimtab.core.config import in_range, method, option
from trimtab.core.group import Group
from trimtab.errors import ConfigError
from trimtab.methods._variant import Variant
from trimtab.methods.lora import LoraConfig


@dataclass
class MontecloraConfig:
    num_samples: int = option(8, "draws whose weighted mean is the noise")
    use_entropy: bool = option(False, "a penalty on weights that are all at one draw")
    dirichlet_prior: float = option(0.1, "concentration that the weights are drawn to")
    sample_scaler: float = option(1e-4, "size of the noise")
    kl_loss_weight: float = option(1e-5, "weight of the divergence from the priors in the loss")
    buffer_size: int = option(150, "kept for the file format; draws are made when they are needed")

    def __post_init__(self) -> None:
        in_range("num_samples", self.num_samples, 1)
        in_range("buffer_size", self.buffer_size, 1)
        if not self.dirichlet_prior > 0:
            raise ConfigError(f"dirichlet_prior={self.dirichlet_prior!r}: it is above 0")


class Sampler(nn.Module):
    """Noise sum_n p_n sigma Z_n diag(v)^1/2 on A: with Z_n ~ N(0, 1) it is sigma |p| Z diag(v)^1/2, so one Z is drawn.

    v (r) = max(exp(2 std_prior) chi, 1e-3), chi ~ chi^2_r: the diagonal of a Wishart draw
    p (n) = softmax(log a - mean log a + t^1/2 z), z ~ N(0, 1), t = (1 - 2 / n) / a + mean(1 / a) / n, a the exponential of
    expert_weights_prior: the normal approximation of a Dirichlet draw
    """

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, cfg: MontecloraConfig, r: int, site: Site) -> None:
        super().__init__()
        n, self.cfg = cfg.num_samples, cfg
        self.std_prior = nn.Parameter(torch.rand(r, generator=site.generator("std_prior")))
        self.expert_weights_prior = nn.Parameter(torch.rand(n, generator=site.generator("expert_weights_prior")))
        self.register_buffer("gaussian_var_prior", torch.eye(r))  # diag(v) and p of the last draw
        self.register_buffer("expert_weights", torch.full((n,), 1 / n))
        self.register_buffer("chi", torch.exp(-2 * self.std_prior.detach()), persistent=False)  # so that v = 1
        self.register_buffer("z", torch.zeros(n), persistent=False)

    def v(self) -> Tensor:
        return (torch.exp(2 * self.std_prior) * self.chi).clamp(min=1e-3)

    def p(self) -> Tensor:
        a, n = torch.exp(self.expert_weights_prior).clamp(min=1e-6), len(self.expert_weights_prior)
        t = ((1 - 2 / n) / a + (1 / a).sum() / n**2).clamp(min=1e-6) + 1e-6
        return (a.log() - a.log().mean() + t.sqrt() * self.z).softmax(0)

    def forward(self, A: Tensor) -> Tensor:
        """A under new noise. torch's own generator draws, so recomputed activations see the same."""
        r = len(self.std_prior)
        self.chi, self.z = A.new_empty(r, r).normal_().square().sum(0), torch.randn_like(self.expert_weights)
        v, p = self.v(), self.p()
        with torch.no_grad():
            self.gaussian_var_prior.copy_(v.diag())
            self.expert_weights.copy_(p)
        return A + self.cfg.sample_scaler * p.norm() * (v.sqrt() * torch.randn_like(A).movedim(0, -1)).movedim(-1, 0)

    def penalty(self) -> Tensor:
        """Divergences of weights, Wishart and normal draws from their priors, of the draw that the last forward made."""
        a, s, v = torch.exp(self.expert_weights_prior), 2 * self.std_prior, self.v()
        weights = kl_divergence(Dirichlet(a), Dirichlet(torch.full_like(a, self.cfg.dirichlet_prior)))
        scale = len(s) / 2 * (s.exp() - s - 1).sum()
        normal = len(a) / 2 * (v - v.log() - 1).sum()
        entropy = self.p().square().sum() if self.cfg.use_entropy else 0.0
        return self.cfg.kl_loss_weight * (weights + scale + normal) + entropy


@method("LORA", config=LoraConfig, small={"r": 4, "monteclora_config": {"num_samples": 3}}, switch="monteclora_config")
class MonteCLoRA(Variant):
    """W' = W + s B A;  in training W + s B (A + sum_n p_n E_n)                                               arXiv:2411.04358

    The draws E_n and their weights p_n are those of `Sampler`. Penalty: the mean of all layers of kl_loss_weight times the
    divergences, and of |p|^2 with use_entropy.
    """

    noisy = True

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.lora_monteclora_sampler = Sampler(cfg.monteclora_config, len(self.lora.lora_A.weight), site)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B = self.factors()
        A = self.lora_monteclora_sampler(A) if self.training else A
        return self.lora.plus(base(x), base.op(self.lora.drop(x), A), base, B)

    @classmethod
    def penalty(cls, group: Group) -> Tensor | None:
        found: list[Any] = [a.lora_monteclora_sampler for _, a in group.each(cls) if a.lora.lora_A.weight.requires_grad]
        return torch.stack([s.penalty() for s in found]).mean() if found else None

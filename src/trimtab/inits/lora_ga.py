"""LoRA-GA: the factors start along the gradient that full fine-tuning would take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.core.config import in_range, one_of, option
from trimtab.errors import TrainingError
from trimtab.inits import _calibrate as data
from trimtab.inits._spectrum import at_most, dense, leading
from trimtab.inits._start import Init, init


@dataclass(kw_only=True)
class LoraGAConfig:
    direction: str = option("ArB2r", "which of 2r directions go to A and to B: ArBr, A2rBr, ArB2r or random")
    scale: str = option("stable", "size of the factors: stable, weight_svd, gd_scale or unit")
    stable_gamma: int = option(16, "stable: B is scaled by out^(1/4) / sqrt(stable_gamma)")

    def __post_init__(self) -> None:
        one_of("direction", self.direction, ["ArBr", "A2rBr", "ArB2r", "random"])
        one_of("scale", self.scale, ["stable", "weight_svd", "gd_scale", "unit"])
        in_range("stable_gamma", self.stable_gamma, 1)


@init
class LoRAGA(Init):
    """A = V_I^T, B = c U_J S_J of the gradient dL/dW = U S V^T; the rest stays frozen            arXiv:2407.05000

    I and J are r of the first 2r numbers each (`direction`), c the factor of `scale`.
    """

    shifted, options, needs = True, LoraGAConfig, "preprocess_loraga"

    def __init__(self, cfg: Any, rest: str = "") -> None:
        super().__init__(cfg, rest)
        cfg.lora_ga_config = cfg.lora_ga_config or LoraGAConfig()
        self.own: LoraGAConfig = cfg.lora_ga_config

    def fits(self, site: Site, r: int) -> None:
        super().fits(site, r)
        at_most(site, r, min(site.shape) // 2)

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        found, r = data.needed(site, "lora_ga", self.needs), A.shape[0]
        U, S, Vh = found["U"], found["S"], found["Vh"]
        some = torch.randperm(2 * r, generator=site.generator("lora_ga"))[:r]
        a, b = {
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
            "A2rBr": (slice(r, 2 * r), slice(r)),
            "ArB2r": (slice(r), slice(r, 2 * r)),
            "random": (some, some),
        }[self.own.direction]
        A.copy_(Vh[a])
        B.copy_(U[:, b] * S[b])
        if self.own.scale == "stable":
            B *= site.shape[0] ** 0.25 / self.own.stable_gamma**0.5
        elif self.own.scale == "weight_svd" and S[b][0] > 0:
            B *= float(leading(dense(site), r, 4, site.generator("weight"))[1][0] / S[b][0])
        elif self.own.scale == "gd_scale":
            A /= s
            B /= s

    def calibrate(self, model: nn.Module, batches: Iterable[Any]) -> None:
        preprocess_loraga(model, self.cfg, lambda: [model(**batch).loss.backward() for batch in batches] and None)


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Find the leading directions of the gradients of the weights that `lora_config` names, over all `backward()` of
    `train_step()`. Call it before `get_peft_model`. Nothing of the model is changed, and no weight needs a gradient of its
    own, so that it works on quantised layers."""
    sites = data.sites_of(model, lora_config)
    key = "{}._peft_loraga_grad".format
    cache = data.read_cache(cache_file)
    if cache is None:
        found = _gradients(data.bare(model), sites, train_step)
        cache = {key(s.name): found.pop(s.name).T if s.base.transposed else found.pop(s.name) for s in sites}
        data.write_cache(cache_file, cache)
    for site in sites:
        G = data.cached(cache, key(site.name), cache_file).to(site.base.device)
        G = (G.T if site.base.transposed else G).to(torch.promote_types(G.dtype, torch.float32))
        r, most = site.pick(lora_config.rank_pattern, lora_config.r), min(G.shape)
        U, S, Vh = leading(G, min(4 * r, most), 4, site.generator("gradient"))
        data.keep(site, "lora_ga", U=U[:, : 2 * r].clone(), S=S[: 2 * r].clone(), Vh=Vh[: 2 * r].clone())


def _gradients(model: nn.Module, sites: list[Site], step: Callable[[], Any]) -> dict[str, Tensor]:
    """dL/dW = dy^T x of each layer, in float32: the mean over its calls."""
    sums: dict[str, Tensor] = {}
    calls = dict.fromkeys((s.name for s in sites), 0)

    def look(site: Site, inputs: Any, output: Tensor) -> None:
        x = data.rows(inputs[0])

        def back(dy: Tensor) -> None:
            G = (data.rows(dy).T @ x.to(dy.dtype)).to(torch.promote_types(x.dtype, torch.float32))
            sums[site.name] = sums[site.name] + G if site.name in sums else G
            calls[site.name] += 1

        if torch.is_grad_enabled():
            (output if output.requires_grad else output.requires_grad_()).register_hook(back)

    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        with data.mode(model, training=True), data.watched(sites, look), torch.enable_grad():
            step()
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)
    if missing := [name for name, n in calls.items() if not n]:
        raise TrainingError(f"preprocess_loraga: no gradient came to {missing[0]!r}. Fix: train_step must call loss.backward()")
    return {name: sums[name] / n for name, n in calls.items()}

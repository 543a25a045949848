"""CorDA: the weight is decomposed as the inputs of a few examples see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.core.config import one_of, option
from trimtab.errors import ConfigError, TrainingError
from trimtab.inits import _calibrate as data
from trimtab.inits._spectrum import at_most, dense
from trimtab.inits._start import Init, init


@dataclass(kw_only=True)
class CordaConfig:
    cache_file: str | None = option(None, "the decomposition is kept there, and read the next time")
    covariance_file: str | None = option(None, "the covariances are kept there, for another rank")
    corda_method: str = option("ipm", "ipm: trains what the examples use most; kpm: what they use least")
    verbose: bool = option(False, "print each layer that is decomposed")
    use_float16_for_covariance: bool = option(False, "sum the covariances in the model's own dtype")
    prune_temporary_fields: bool = option(True, "kept for the file: layers are left as they were")

    def __post_init__(self) -> None:
        one_of("corda_method", self.corda_method, ["ipm", "kpm"])


@init
class CorDA(Init):
    """A = sqrt(S_r / s) V_r^T C^-1, B = U_r sqrt(S_r / s) of W C = U S V^T; the rest stays frozen     arXiv:2406.05223

    C (in, in) is the covariance of the layer's inputs, x / |max x|, with 0.01 of its mean diagonal added. ipm: the r largest
    singular values; kpm: the r smallest.
    """

    shifted, options, needs = True, CordaConfig, "preprocess_corda"

    def __init__(self, cfg: Any, rest: str = "") -> None:
        super().__init__(cfg, rest)
        cfg.corda_config = cfg.corda_config or CordaConfig()

    def fits(self, site: Site, r: int) -> None:
        super().fits(site, r)
        at_most(site, r, min(site.shape))

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        found = data.needed(site, "corda", self.needs)
        U, S, V, r = found["U_WC"], found["S_WC"], found["V_WC"], A.shape[0]
        if len(S) != r:
            raise ConfigError(f"{site.name!r} was decomposed at rank {len(S)}, and r is {r}. Fix: the same config for both")
        root = (S / s).sqrt()
        A.copy_(root[:, None] * V.T)
        B.copy_(U * root)

    def calibrate(self, model: nn.Module, batches: Iterable[Any]) -> None:
        preprocess_corda(model, self.cfg, lambda: [model(**batch) for batch in batches] and None)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module, lora_config: Any, run_model: Callable[[], Any] | None = None, hooked_model: nn.Module | None = None
) -> None:
    """Decompose the layers that `lora_config` names, by the inputs they get while `run_model()` runs `hooked_model` or
    `model`. Call it before `get_peft_model`. No file and no `run_model` raises `ConfigError`."""
    own: CordaConfig = lora_config.corda_config or CordaConfig()
    sites, device = data.sites_of(model, lora_config), data.device_of(data.bare(model))
    cache = data.read_cache(own.cache_file)
    if cache is None:
        covariance = data.read_cache(own.covariance_file)
        if covariance is None:
            if run_model is None:
                raise ConfigError("preprocess_corda: run_model is needed, where no file holds what it would give")
            hooked = hooked_model or model
            covariance = _covariances(hooked, data.sites_of(hooked, lora_config), run_model, own.use_float16_for_covariance)
            data.write_cache(own.covariance_file, covariance)
        cache = {}
        for site in sites:
            if own.verbose:
                print(f"CorDA: {site.name} {site.shape}")
            r = site.pick(lora_config.rank_pattern, lora_config.r)
            C = data.cached(covariance, site.name, own.covariance_file).to(site.base.device)
            found = _decomposed(dense(site), C, r, last=own.corda_method == "kpm")
            cache |= {f"{site.name}.eigens.{name}": value for name, value in found.items()}
        data.write_cache(own.cache_file, cache)
    for site in sites:
        found = {n: data.cached(cache, f"{site.name}.eigens.{n}", own.cache_file) for n in ("S_WC", "U_WC", "V_WC")}
        data.keep(site, "corda", **{n: t.to(device) for n, t in found.items()})


def _covariances(model: nn.Module, sites: list[Site], run: Callable[[], Any], half: bool) -> dict[str, Tensor]:
    """The mean over calls of X^T X, X = inputs / |their largest|."""
    sums, calls = {s.name: torch.zeros(()) for s in sites}, dict.fromkeys((s.name for s in sites), 0)

    def look(site: Site, inputs: Any, _: Any) -> None:
        x = data.rows(inputs[0])
        x = x if half else x.to(torch.promote_types(x.dtype, torch.float32))
        x = x / x.max().abs()
        sums[site.name] = sums[site.name].to(x) + x.T @ x
        calls[site.name] += 1

    with data.mode(model, training=False), data.watched(sites, look):
        run()
    if bad := [name for name, found in sums.items() if not calls[name] or not found.isfinite().all()]:
        raise TrainingError(f"preprocess_corda: {bad[0]!r} saw no input, or one that is not finite, while run_model ran")
    return {name: found / calls[name] for name, found in sums.items()}


def _decomposed(w: Tensor, C: Tensor, r: int, *, last: bool) -> dict[str, Tensor]:
    C, damp, eye = C.to(w.dtype), 0.01, torch.eye(len(C)).to(w)
    while True:  # more is added to the diagonal until the inverse is one
        fixed = C + damp * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, eye) < 0.05:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(w @ fixed, full_matrices=False)
    pick = slice(-r, None) if last else slice(r)
    return {"S_WC": S[pick].clone(), "U_WC": U[:, pick].clone(), "V_WC": (Vh[pick] @ inverse).T.clone()}

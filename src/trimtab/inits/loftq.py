"""LoftQ: the factors start as what 4-bit quantisation takes from the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core import group as groups
from trimtab.core.adapter import Site
from trimtab.core.config import in_range, one_of, option
from trimtab.errors import ConfigError, NotSupported
from trimtab.inits import _calibrate as data
from trimtab.inits._spectrum import at_most, dense
from trimtab.inits._start import Init, Started, init
from trimtab.inits._weights import Weights


@dataclass(kw_only=True)
class LoftQConfig:
    loftq_bits: int = option(4, "4: nf4 in blocks of 64; 8: whole numbers, a scale for each row")
    loftq_iter: int = option(1, "times that quantisation and decomposition take turns")

    def __post_init__(self) -> None:
        one_of("loftq_bits", self.loftq_bits, [4, 8])
        in_range("loftq_iter", self.loftq_iter, 1)


@init
class LoftQ(Init):
    """A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s) of W - Q(W - s B A) = U S V^T           arXiv:2310.08659

    Q rounds to few bits; it starts with B A = 0 and is done `loftq_iter` times. What is frozen is W - s B A, which Q moves less
    than W. On layers that are quantised already: `replace_lora_weights_loftq`.
    """

    shifted, options = True, LoftQConfig
    remedy = "load the model in 4 bits, and the adapter with its config's init_lora_weights set to true"

    def __init__(self, cfg: Any, rest: str = "") -> None:
        super().__init__(cfg, rest)
        cfg.loftq_config = cfg.loftq_config or LoftQConfig()
        self.own: LoftQConfig = cfg.loftq_config

    def fits(self, site: Site, r: int) -> None:
        super().fits(site, r)
        at_most(site, r, min(site.shape))
        if quantised(site):
            raise NotSupported(
                f"{site.name!r} ({type(site.base.layer).__name__}) is a quantised layer: LoftQ needs the weight before. "
                f"Fix: init_lora_weights=True, then replace_lora_weights_loftq(model, model_path)"
            )

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        w, taken = dense(site), torch.zeros(())
        for _ in range(self.own.loftq_iter):
            a, b = decomposed(w - _rounded(w - taken, self.own.loftq_bits), A.shape[0], s)
            taken = s * b @ a
        A.copy_(a)
        B.copy_(b)


def quantised(site: Site) -> bool:
    weight = getattr(site.base.layer, "weight", None)
    return not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.numel() == site.shape[0] * site.shape[1])


def decomposed(rest: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(rest, full_matrices=False)
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _rounded(w: Tensor, bits: int) -> Tensor:
    if bits == 8:
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (w / scale).round() * scale
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(w.float(), quant_type="nf4", blocksize=64, compress_statistics=False)
    return dequantize_4bit(codes, state).to(w.dtype)


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """On quantised layers: B A becomes the leading part of the published weight less the quantised one, so that the model
    starts nearer to what it was. The weights are read one by one from the safetensors of `model_path`, or of the folder that
    the model came from. Where `callback(model, layer)` is false after a layer, that layer is put back."""
    bare = data.bare(peft_model)
    group, weights = groups.group(bare, adapter_name), Weights(bare, model_path)
    sites = {s.name: s for s in data.sites_of(peft_model, group.config, adapter_name) if quantised(s)}
    if not sites or getattr(group.config, "use_dora", False):
        raise ConfigError("replace_lora_weights_loftq: the adapter must be a LoRA on quantised layers")
    for name, part in group.each(Started):
        if name not in sites:
            continue
        w, A, B = weights.of(f"{name}.weight"), part.lora_A.weight, part.lora_B.weight
        q = dense(sites[name])
        before = A.clone(), B.clone()
        for factor, value in zip((A, B), decomposed(w.to(q) - q, A.shape[0], part.s), strict=True):
            factor.copy_(value)
        if callback is not None and not callback(peft_model, name):
            A.copy_(before[0])
            B.copy_(before[1])

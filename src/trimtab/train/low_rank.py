"""What a run does for low-rank adapters: optimizers that know their factors, and starts that look at the rows first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from trimtab.core.config import replaced
from trimtab.data import Prepared
from trimtab.inits._start import calibrate, init_of
from trimtab.inits.loftq import replace_lora_weights_loftq
from trimtab.model import PeftModel, get_peft_model
from trimtab.optim import create_loraplus_optimizer, create_riemannian_optimizer
from trimtab.optim.lorafa import frozen_a
from trimtab.train.batches import Collator

# the optimizers by the names that `optim` has for them, and their own options with their defaults
OPTIONS: dict[str, dict[str, Any]] = {
    "loraplus": {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-6},
    "lorafa": {},
    "riemannian": {"riemannian_reg": 0.01},
}
ROWS, AT_ONCE = 256, 4  # of the training rows that a start looks at, and in one forward pass


def chosen(name: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    """An optimizer's own options: those that are set, and defaults."""
    said = settings or {}
    return {k: default if said.get(k) is None else said[k] for k, default in OPTIONS[name].items()}


def optimizer(name: str, model: nn.Module, args: TrainingArguments, settings: dict[str, Any] | None) -> torch.optim.Optimizer:
    """The optimizer `name` for what `model` trains; loraplus and riemannian are on top of AdamW."""
    own = chosen(name, settings)
    rate, decay = args.learning_rate, args.weight_decay
    adam: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == "lorafa":
        return frozen_a(model, lr=rate, weight_decay=decay, betas=adam["betas"])
    if name == "loraplus":
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_weight_decay=decay, **own, **adam)
    adam["weight_decay"] = decay
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=rate, reg=own["riemannian_reg"], **adam)


def adapted(base: nn.Module, config: Any, folder: Path, data: Prepared, pad_token_id: int) -> PeftModel:
    """A new adapter on `base`. A start that needs data sees the first training rows; LoftQ on quantised layers the weights in
    `folder`."""
    name = getattr(config, "init_lora_weights", None)
    if name == "loftq" and getattr(base, "is_quantized", False):
        model = get_peft_model(base, replaced(config, init_lora_weights=True, loftq_config={}))
        replace_lora_weights_loftq(model, folder)
        return model
    if isinstance(name, str) and init_of(config).needs:
        calibrate(base, config, list(_batches(data, pad_token_id, next(base.parameters()).device)))
    return get_peft_model(base, config)


def _batches(data: Prepared, pad_token_id: int, device: torch.device) -> Iterator[dict[str, Any]]:
    rows, pad = iter(data.train[:ROWS]), Collator(pad_token_id, rows=False)
    while some := list(islice(rows, AT_ONCE)):
        yield {k: v.to(device) for k, v in pad(some).items()}

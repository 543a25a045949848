"""Any adapter that changes weights, as a LoRA: for servers and tools that know nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab import blend, store
from trimtab.blend import Fit
from trimtab.files import write_text
from trimtab.methods.lora import LoraConfig
from trimtab.verbs import Verbs

REPORT = "lora_conversion.json"


class Converted(tuple[LoraConfig, dict[str, Tensor]]):
    """(config, tensors), and in `fit` how near they are to the adapter."""

    fit: Fit


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> Converted:
    """The LoRA that is nearest to an adapter of any method, layer by layer: B A = W' - W cut to `rank`.

    `rank`: an int, at most what a layer has; or a float up to 1, the share of the squared singular values that each layer
    keeps. What it does to biases becomes `lora_bias`. `fit` of the result says the rank and the relative error
    |B A - (W' - W)| / |W' - W| by layer, and the error of all together. `compile_kwargs` changes nothing.
    """
    base = model.get_base_model() if isinstance(model, Verbs) else model
    config, tensors, fit = blend.combine(
        base, [adapter_name], [1.0], blend.Recipe("svd", rank), progressbar=progressbar
    )
    if not isinstance(model, Verbs):  # an injected model's keys have no prefix
        tensors = {k.removeprefix(store.PREFIX): v for k, v in tensors.items()}
    made = Converted((config, tensors))
    made.fit = fit
    return made


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> Fit:
    """Write what `convert_to_lora` gives as an adapter folder, with the errors beside it in `lora_conversion.json`."""
    made = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    store.put(Path(path), made[1], made[0])
    write_text(Path(path) / REPORT, json.dumps({"rank": rank} | asdict(made.fit), indent=2) + "\n")
    return made.fit

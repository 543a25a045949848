"""Models that mix experts: `create_arrow_model`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core import group as groups
from trimtab.core.sites import layers, matches
from trimtab.errors import ConfigError, NotSupported
from trimtab.methods.arrow import ArrowConfig
from trimtab.methods.lora import LoraConfig
from trimtab.model import PeftModel

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | Path],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | Path] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model that sends each token through the LoRAs (`task_0`, `task_1`, ...) that fit it best; `arrow_router` is active.

    General adapters (`gks_0`, ...) are what `use_gks` takes from each expert. All have one rank and the same linear layers.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("create_arrow_model: no task_specific_adapter_paths, so there is nothing to route among")
    general = list(general_adapter_paths or []) if arrow_config.use_gks else []
    if arrow_config.use_gks and not general:
        raise ConfigError("use_gks takes what general adapters know from each expert: general_adapter_paths is empty")
    tasks = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    others = {f"gks_{i}": path for i, path in enumerate(general)}
    (first, path), *rest = (tasks | others).items()
    model = PeftModel.from_pretrained(base_model, adapter_name=first, **_source(path) | adapter_kwargs)
    for name, path in rest:
        model.load_adapter(adapter_name=name, **_source(path) | adapter_kwargs)
    settings = dataclasses.replace(arrow_config, task_adapter_names=list(tasks), gks_adapter_names=list(others))
    names, r = _alike(model.get_base_model(), [*tasks, *others])
    model.add_adapter(ROUTER, LoraConfig(arrow_config=settings, target_modules=names, r=r))
    model.set_adapter(ROUTER)
    return model


def _source(path: str | Path) -> dict[str, Any]:
    """A folder, or a hub id that may go on with a folder inside it: `user/name/folder`."""
    user, _, rest = str(path).strip("/").partition("/")
    name, _, inside = rest.partition("/")
    return {"model_id": path} if Path(path).exists() or not inside else {"model_id": f"{user}/{name}", "subfolder": inside}


def _alike(model: nn.Module, names: list[str]) -> tuple[list[str], int]:
    """The targets and the rank that all of the adapters have."""
    first, *others = (groups.group(model, name) for name in names)
    for group in [first, *others]:
        if group.config.peft_type != "LORA":
            raise NotSupported(f"Arrow mixes plain LoRAs, and {group.name!r} is {group.config.peft_type}")
        if odd := set(group.layers) ^ set(first.layers):
            raise NotSupported(f"Arrow: {group.name!r} and {first.name!r} stand on other layers: {sorted(odd)[0]!r}, ...")
    leaves = sorted({path.rpartition(".")[2] for path in first.layers})
    fit = {path for path, _ in layers(model) if path and matches(path, leaves)} == set(first.layers)
    config: Any = first.config
    return leaves if fit else sorted(first.layers), config.r

"""Adapters on a bare torch model, which stays the model that it is, and their tensors under published names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from trimtab import mergeable, mixed, store
from trimtab.core import group as groups
from trimtab.core.config import PeftConfig
from trimtab.verbs import Verbs


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an active, trainable adapter on a bare model, and return the model itself."""
    group = groups.attach(model, peft_config, adapter_name)
    mixed.watch(model)
    mergeable.warn(group)
    groups.activate(model, [*groups.active(model), adapter_name], trainable=not peft_config.inference_mode)
    if state_dict is not None:
        store.load(model, group, state_dict)
    return model


def _torch_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, Verbs) else model


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The adapter's tensors under their published keys; without the `base_model.model.` prefix for an injected model."""
    values = (
        {id(t): state_dict[k] for k, t in model.state_dict(keep_vars=True).items() if k in state_dict}
        if state_dict
        else None
    )
    tensors = store.state(groups.group(_torch_model(model), adapter_name), values)
    return tensors if isinstance(model, Verbs) else {k.removeprefix(store.PREFIX): v for k, v in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = True,
) -> store.LoadReport:
    """Copy published tensors into an adapter; strict as `PeftModel.load_adapter`."""
    model = _torch_model(model)
    return store.load(
        model,
        groups.group(model, adapter_name),
        peft_model_state_dict,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )

"""Which layers carry which adapters, and in what state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from trimtab.core import group as groups
from trimtab.core.base import port
from trimtab.core.layer import AdapterLayer
from trimtab.core.sites import frozen, layers
from trimtab.verbs import Verbs

Irregular = Literal["irregular"]  # what is not the same on all layers


@dataclass
class TunerLayerStatus:
    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def same(values: Iterable[Any]) -> Any:
    """The value that all have, or "irregular"."""
    first, *rest = [*values] or [False]
    return first if all(v == first for v in rest) else "irregular"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all): tied weights once, a quantised weight as the numbers it stands for."""
    stands_for: dict[int, int] = {}
    for _, module in layers(model):
        weight = getattr(frozen(module), "weight", None)
        if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            stands_for[id(weight)] = prod(port(frozen(module)).shape) or weight.numel()
    counts = [(p.requires_grad, stands_for.get(id(p), p.numel())) for p in model.parameters()]
    return sum(n for on, n in counts if on), sum(n for _, n in counts)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One entry for each adapted layer."""
    model = model.get_base_model() if isinstance(model, Verbs) else model
    return [_layer(name, layer) for name, layer in groups.adapted(model)]


def _layer(name: str, layer: AdapterLayer) -> TunerLayerStatus:
    weight = getattr(frozen(layer), "weight", None)
    quantised = isinstance(weight, torch.Tensor) and not weight.is_floating_point()
    adapters: dict[str, nn.Module] = dict(layer.adapters.items())
    return TunerLayerStatus(
        name=name,
        module_type=type(frozen(layer)).__name__,
        enabled=not layer.disabled,
        active_adapters=list(layer.active),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={k: same(p.requires_grad for p in a.parameters()) for k, a in adapters.items()},
        available_adapters=sorted(adapters),
        devices={k: sorted({str(p.device) for p in a.parameters()}) for k, a in adapters.items()},
        quantization_backend=type(layer.port).__name__.lower() if quantised else None,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The layers' states in one; what differs between layers is "irregular"."""
    base = model.get_base_model() if isinstance(model, Verbs) else model
    states = get_layer_status(base)
    names = sorted(groups.groups(base))
    parts = {n: list(groups.group(base, n).parts()) for n in names}
    trainable, total = count_parameters(base)
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(model).__name__ if isinstance(model, Verbs) else "None",
        peft_types={n: groups.group(base, n).config.peft_type for n in names},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(states),
        enabled=same(s.enabled for s in states),
        active_adapters=groups.active(base),
        merged_adapters=same(s.merged_adapters for s in states) or [],
        requires_grad={n: same(p.requires_grad for part in parts[n] for p in part.parameters()) for n in names},
        available_adapters=names,
        devices={n: sorted({str(p.device) for part in parts[n] for p in part.parameters()}) for n in names},
        quantization_backend=same(s.quantization_backend for s in states) or None,
    )

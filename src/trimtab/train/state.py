"""The state of optimizer, schedule, scaler and random numbers, as tensors by parameter name and plain JSON: no pickle, and
no order of parameters that a resumed run would have to repeat."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import BadCheckpoint, TrainingError


def optimizer_state(optimizer: Any, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `<parameter>/<entry>`; groups with their parameters' names, and entries that are plain values."""
    state, names = inner(optimizer).state_dict(), _names(optimizer, model)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for entry, value in entries.items():
            place = f"{names[number]}/{entry}"
            if isinstance(value, Tensor):
                tensors[place] = value
            else:
                values[place] = _plain(value, f"the optimizer's {place}")
    groups = [
        {k: [names[i] for i in v] if k == "params" else _plain(v, f"the optimizer's {k}") for k, v in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"groups": groups, "values": values}


def load_optimizer(optimizer: Any, model: nn.Module, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Put a saved state back under the same names, whatever their order."""
    own, names = inner(optimizer), _names(optimizer, model)
    state = own.state_dict()
    numbers = {name: i for i, name in enumerate(names)}
    there = {name for group in about["groups"] for name in group["params"]}
    if wrong := [f"only there: {n}" for n in there - numbers.keys()] + [f"missing there: {n}" for n in numbers.keys() - there]:
        raise BadCheckpoint("the optimizer held other tensors in the checkpoint. " + "; ".join(sorted(wrong)[:5]))
    saved = {frozenset(group["params"]): group for group in about["groups"]}
    for group in state["param_groups"]:
        same = saved.get(frozenset(names[i] for i in group["params"]))
        if same is None:
            raise BadCheckpoint("the optimizer's groups hold other tensors than in the checkpoint: is weight_decay another?")
        for key, value in same.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    state["state"] = {}
    for place, value in (tensors | about["values"]).items():
        name, _, entry = place.rpartition("/")
        state["state"].setdefault(numbers[name], {})[entry] = value
    own.load_state_dict(state)
    parameters = [p for group in own.param_groups for p in group["params"]]
    for place, value in tensors.items():  # torch casts them to the parameter's dtype: a rounding that did not happen there
        name, _, entry = place.rpartition("/")
        held = own.state[parameters[numbers[name]]]
        if isinstance(now := held.get(entry), Tensor) and now.dtype != value.dtype:
            held[entry] = value.to(now.device)


def inner(optimizer: Any) -> Any:
    """The torch optimizer: accelerate's stands around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _names(optimizer: Any, model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters, in the order that it numbers them."""
    known = {id(p): name for name, p in model.named_parameters()}
    every = [p for group in inner(optimizer).param_groups for p in group["params"]]
    return [known.get(id(p), f"parameter {i} of the optimizer") for i, p in enumerate(every)]


def schedule_state(scheduler: Any) -> Any:
    return _plain(scheduler.state_dict(), "the schedule")


def scaler_state(scaler: Any) -> Any:
    return None if scaler is None else _plain(scaler.state_dict(), "the scaler")


def random_state(device: torch.device) -> dict[str, Any]:
    """All that a run draws random numbers from."""
    kind, keys, *rest = np.random.get_state()
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_which(device))
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "cpu": _hex(torch.get_rng_state()),
        "device": None if own is None else _hex(own),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["cpu"]))
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(_bytes(state["device"]), *_which(device))


def _which(device: torch.device) -> list[torch.device]:
    """What torch asks for where there may be several devices of a kind; of Apple's there is one."""
    return [] if device.type == "mps" else [device]


def _hex(state: Tensor) -> str:
    return bytes(state.cpu().tolist()).hex()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _plain(value: Any, what: str) -> Any:
    """The value, if JSON can hold it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise TrainingError(
            f"{what} is a {type(value).__name__}, which a checkpoint cannot hold. Fix: another --optim, or no --save_steps"
        ) from None
    return value

"""Device and dtype, chosen by what is there; every choice comes with the line that says why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
from torch import nn

from trimtab.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """Where a run computes and in which dtype the frozen base is kept. `why` is the line for the user."""

    device: torch.device
    dtype: torch.dtype
    why: str


def pick(dtype: str = "auto") -> Hardware:
    """The best device of this machine; `dtype` is `auto` or the name of what the user asked for."""
    device = torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    if device.type == "cuda" and (rank := os.environ.get("LOCAL_RANK")):  # each of several ranks has a card of its own
        device = torch.device("cuda", int(rank))
        torch.cuda.set_device(device)
    native, reason = native_bf16(device)
    if dtype == "auto":
        chosen = torch.bfloat16 if native else torch.float32
    else:
        chosen = getattr(torch, dtype)
        reason = "as asked" + (f"; {_instead(device)}{reason}" if chosen is torch.bfloat16 and not native else "")
    if chosen is torch.float16 and device.type == "cpu":
        raise ConfigError("dtype float16 was asked for, and a CPU does not train in it: take bfloat16, float32 or auto")
    return Hardware(device, chosen, f"{device.type}, {str(chosen).removeprefix('torch.')}: {reason}")


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether the chip multiplies bfloat16 itself. Emulated bfloat16 is slower than float32, so it does not count."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (capability {major}.{minor})"
        # torch.cuda.is_bf16_supported() is true on 7.5 cards, which emulate it
        return (True, f"{name} computes it natively") if major >= 8 else (False, f"{name} has no native bfloat16")
    if device.type == "mps":
        release = platform.mac_ver()[0]
        modern = int(release.split(".")[0] or 0) >= 14
        return modern, f"macOS {release} " + ("has bfloat16 on its GPU" if modern else "has no bfloat16 on its GPU")
    if _cpu_has_bf16():
        return True, "this CPU multiplies it natively"
    return False, "this CPU has no native bfloat16"


def _instead(device: torch.device) -> str:
    return "multiplied in float32, for " if device.type == "cpu" else ""  # see `load_model`, held


def _cpu_has_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    known = torch.cpu.get_capabilities()
    return any(known.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


def emulated(model: nn.Module) -> str:
    """The line for a model whose products a CPU does not have, and takes ten to eighty times as long for; else empty."""
    low = any(m.weight.dtype is torch.bfloat16 and m.weight.is_cpu for m in model.modules() if type(m) is nn.Linear)
    if not low or native_bf16(torch.device("cpu"))[0]:
        return ""
    return "this CPU has no native bfloat16 and is many times slower in it: load the model in dtype=torch.float32"


def busy() -> str | None:
    """One line when other programs already use more than the cores: figures of speed would mislead."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return (
        f"the machine is busy: load {load:.1f} on {cores} cores, so training will be slower" if load > cores else None
    )

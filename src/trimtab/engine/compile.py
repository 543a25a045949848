"""Regional compilation: one decoder layer is compiled, and serves all of them, at every length."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn
from torch._functorch import config as functorch

from trimtab.errors import ConfigError

Choice = Literal["auto", "on", "off"]
# what a run must compute before the half minute of compiling is won back: some five minutes, in operations
WORTH = {"cpu": 8e13, "cuda": 3e16}
# norms and gates are computed again in the backward, and no product: a third less is kept, in the same time. A share of what
# would be kept otherwise; 0.7 and 0.85 give the same, at 0.5 products are done twice
KEPT = 0.8


class Compiled:
    """The decoder layers of a model in compiled form, to be used inside `on` only: all else sees the plain layers.

    The first layer stays as it is: its input wants no gradient, so it would need a compilation of its own.
    """

    def __init__(self, model: Any) -> None:
        self.layers = decoder_layers(model)[1:]
        self.calls: list[Any] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        if not self.calls:
            for layer in self.layers:
                layer.compile(dynamic=True)
            self.calls = [layer._compiled_call_impl for layer in self.layers]
        for layer, call in zip(self.layers, self.calls, strict=True):
            layer._compiled_call_impl = call
        try:
            with functorch.patch(activation_memory_budget=KEPT):
                yield
        finally:
            for layer in self.layers:
                layer._compiled_call_impl = None


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers that transformers names as not to be split, of the most frequent kind."""
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    found: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        if type(module).__name__ in names:
            found.setdefault(type(module), []).append(module)
    return max(found.values(), key=len, default=[])


def choose(choice: Choice, model: Any, tokens: float) -> tuple[Compiled | None, str]:
    """The compiled layers or None, and the line that says which and why. `tokens`: all that the run will compute.

    The choice depends on model and rows alone, not on a clock, so a resumed run makes the same one.
    """
    if choice == "off":
        return None, "off, as asked"
    device: str = next(model.parameters()).device.type
    missing = _missing(device)
    if choice == "on":
        if missing:
            raise ConfigError(f"compile on was asked for, and {missing}. Fix: install one, or leave compile at auto")
        return Compiled(model), "each decoder layer, as asked; the first step takes half a minute to a minute longer"
    if device not in WORTH or len(decoder_layers(model)) < 4:
        return None, f"off: nothing to win on {device}"
    work = 4.0 * sum(p.numel() for p in model.parameters()) * tokens
    if work < WORTH[device]:
        return None, "off: the run is too short to win back the half minute that it takes"
    if missing:
        return None, f"off: {missing}"
    return Compiled(model), "each decoder layer: the run is long enough to win back the half minute that it takes"


def _missing(device: str) -> str:
    if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        return "no C++ compiler is found"
    if device == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    return ""

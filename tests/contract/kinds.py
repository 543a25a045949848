"""The layers and the methods that the contract is checked on: every registered method, every registered base."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from trimtab import PeftModel, get_peft_model
from trimtab.bases.held import HeldLinear
from trimtab.core.adapter import Adapter, ModelAdapter
from trimtab.core.config import PeftConfig, config_for, default_like, load, methods
from trimtab.core.layer import AdapterLayer
from trimtab.errors import ConfigError, NotMergeable, NotSupported, TrimtabWarning


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer in one state: how one is made, and the shape of an input (None: token ids)."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None
    quantised: bool = False
    bound: float = 0.0  # |w - the unquantised w| over the largest value of its block
    held: bool = False  # where it computes in float32, its weight has 16 bits

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        made = self.make()
        if self.quantised:
            made.compute_dtype = dtype  # type: ignore[assignment]
            return made
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        if self.held and dtype is torch.float32:
            made = made.requires_grad_(False)
            made.weight.data = made.weight.data.bfloat16()  # type: ignore[operator,union-attr]
            return HeldLinear(made)  # type: ignore[arg-type]
        return made.to(dtype)

    def host(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        made = Host(self.layer(dtype))
        return made if self.quantised or (self.held and dtype is torch.float32) else made.to(dtype)

    def x(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        if self.shape is None:
            return torch.randint(0, 11, (2, 5), generator=draw)
        return torch.randn(self.shape, generator=draw).to(dtype)


def bnb(quant_type: str, state: str = "fresh", *, double: bool = True) -> nn.Module:
    """A 4-bit layer: fresh, after a forward without gradient, or in bitsandbytes' packed form for CPUs."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=double)
    weight = torch.randn(32, 64) * 0.1
    layer.weight = Params4bit(weight, requires_grad=False, quant_type=quant_type, compress_statistics=double)
    layer = layer.to("cpu").requires_grad_(False)
    if layer.weight.quant_state is None:  # a move to the device where it is quantises nothing
        layer.weight = layer.weight._quantize("cpu")  # type: ignore[operator]
    if state == "warm":
        with torch.no_grad():
            layer(torch.randn(2, 64))
    if state == "packed":
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        layer.quant_state = layer.weight.quant_state
    return layer


KINDS = [
    Kind("linear", lambda: nn.Linear(12, 8), (2, 3, 12)),
    Kind("linear-no-bias", lambda: nn.Linear(12, 8, bias=False), (4, 12)),
    Kind("held", lambda: nn.Linear(12, 8), (2, 3, 12), held=True),
    Kind("held-no-bias", lambda: nn.Linear(12, 8, bias=False), (4, 12), held=True),
    Kind("transposed", lambda: Conv1D(8, 12), (2, 3, 12)),
    Kind("embedding", lambda: nn.Embedding(11, 8), None),
    Kind("embedding-padding", lambda: nn.Embedding(11, 8, padding_idx=3), None),
    Kind("conv1d", lambda: nn.Conv1d(8, 12, 3), (2, 8, 9)),
    Kind("conv2d", lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 8, 7)),
    Kind("conv2d-1x1", lambda: nn.Conv2d(4, 8, 1, bias=False), (2, 4, 5, 5)),
    Kind("conv2d-groups", lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6)),
    Kind("conv2d-same", lambda: nn.Conv2d(4, 8, 3, padding="same", dilation=2), (2, 4, 6, 6)),
    Kind("conv2d-circular", lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    Kind("conv3d", lambda: nn.Conv3d(4, 8, 2, stride=(1, 2, 1)), (2, 4, 4, 5, 4)),
    Kind("layernorm", lambda: nn.LayerNorm(12), (2, 3, 12)),
    Kind("rmsnorm", lambda: nn.RMSNorm(12), (2, 3, 12)),
    Kind("llama-rmsnorm", lambda: LlamaRMSNorm(12), (2, 3, 12)),
    Kind("nf4-double", lambda: bnb("nf4"), (2, 3, 64), True, 0.16),
    Kind("nf4-warm", lambda: bnb("nf4", "warm", double=False), (2, 3, 64), True, 0.16),
    Kind("nf4-packed", lambda: bnb("nf4", "packed"), (2, 3, 64), True, 0.16),
    Kind("fp4", lambda: bnb("fp4", double=False), (2, 3, 64), True, 0.18),
    Kind("fp4-packed", lambda: bnb("fp4", "packed", double=False), (2, 3, 64), True, 0.18),
]


SOME = [k for k in KINDS if k.name in ("linear", "embedding", "conv2d", "layernorm", "nf4-packed")]  # one of each


class Host(nn.Module):
    """A model that is one layer and something frozen beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    kind: Kind
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.options), self.kind.name])

    def config(self, **more: Any) -> PeftConfig:
        fields = load(self.method).small | {"target_modules": ["layer"]} | dict(self.options) | more
        return config_for(self.method, **copy.deepcopy(fields))

    def fresh(self, dtype: torch.dtype = torch.float32, name: str = "default") -> PeftModel:
        """The method on the layer as it starts; in eval mode where training draws numbers."""
        made = get_peft_model(self.kind.host(dtype), self.config(), name)
        return made.train(not load(self.method).adapter.noisy)

    def model(self, dtype: torch.dtype = torch.float32, name: str = "default") -> PeftModel:
        """The method on the layer, with what it trains moved off its start."""
        made = self.fresh(dtype, name)
        randomise(made)
        return made

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return Host(self.kind.layer(dtype))

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.kind.x(dtype)


def randomise(model: nn.Module, seed: int = 2, size: float = 0.2) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=draw).to(p.dtype))


def adapted(model: PeftModel) -> AdapterLayer:
    layer = model.get_base_model().layer
    assert isinstance(layer, AdapterLayer)
    return layer


def definition(model: PeftModel, x: Tensor) -> Tensor:
    """What the active adapters mean: the layer's op on the dense weight and bias of the whole stack. One that depends on
    the input has no weight; its forward is its definition."""
    layer = adapted(model)
    stack = layer.stack(layer.active)
    if any(part.routed for part in parts(model)):
        with pytest.raises(NotMergeable):
            stack.weight()
        return stack(x)
    return layer.port.op(x, stack.weight(), stack.bias())


def parts(model: PeftModel) -> list[Adapter]:
    """The adapters of the layer, each by itself where a trained bias stands beside it."""
    return [m for m in adapted(model).adapters.modules() if isinstance(m, Adapter)]


def tolerance(model: PeftModel, dtype: torch.dtype) -> float:
    return max(adapted(model).port.tolerance, 1e-5 if dtype == torch.float32 else 1e-11)


def close(a: Tensor, b: Tensor, rtol: float) -> None:
    """|a - b| within `rtol` of the largest |b|."""
    assert a.shape == b.shape and a.dtype == b.dtype
    error, scale = (a - b).abs().max().item(), b.abs().max().item()
    assert error <= rtol * max(scale, 1e-3), f"{error:.3g} of {scale:.3g}"


def layer_methods() -> list[str]:
    """Those that a layer can carry alone; what mixes others has tests of its own in `tests/methods`."""
    return [m for m in methods() if not issubclass(load(m).adapter, ModelAdapter) and not load(m).adapter.among]


def prompt_methods() -> list[str]:
    return [m for m in methods() if issubclass(load(m).adapter, ModelAdapter)]


_OPTIONS: dict[str, Any] = {"feedforward_modules": ["layer"], "bias": "all"}  # by name, for any config that has one
_SAME = {"inference_mode", "fan_in_fan_out"}  # change nothing of the equation


def variations(method: str) -> list[tuple[tuple[str, Any], ...]]:
    """A method's own yes-or-no options turned over one at a time, its other choices, and the fields above."""
    found: list[tuple[tuple[str, Any], ...]] = [()]
    for f in dataclasses.fields(load(method).config):
        value = load(method).small.get(f.name, f.default)
        if f.name in _OPTIONS:
            found.append(((f.name, _OPTIONS[f.name]),))
        elif isinstance(value, bool) and f.name not in _SAME and not {"variant", "later", "apart", "place"} & set(f.metadata):
            found.append(((f.name, not value),))
        found += [((f.name, choice),) for choice in f.metadata.get("choices", ()) if choice != value]
    return found


def _sort() -> tuple[list[Case], list[Case]]:
    builds: list[Case] = []
    refused: list[Case] = []
    for method in layer_methods():
        for options in variations(method):
            for kind in KINDS if not options else SOME:
                case = Case(method, kind, options)
                try:
                    case.config()
                except ConfigError:
                    continue  # two options that exclude each other
                try:
                    case.fresh()
                    builds.append(case)
                except NotSupported:
                    refused.append(case)
    return builds, refused


with warnings.catch_warnings():  # what cannot be merged is told
    warnings.simplefilter("ignore", TrimtabWarning)
    BUILDS, REFUSED = _sort()
PLAIN = [c for c in BUILDS if not c.options]
assert not default_like(PLAIN)

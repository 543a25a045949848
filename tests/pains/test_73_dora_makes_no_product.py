"""No. 73: the lengths that DoRA divides by are found without B A (out, in), and are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from little import far
from small_llama import move
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab import LoraConfig, get_peft_model

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(48, 40),
    "wide": lambda: nn.Linear(8, 2100),
    "embedding": lambda: nn.Embedding(40, 48),
    "conv": lambda: nn.Conv2d(8, 12, 3),
}


def dora(layer: nn.Module, dtype: torch.dtype = torch.float32, **over: Any) -> tuple[Any, Any]:
    """The model, moved off its start, and its adapter."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer.to(dtype)), LoraConfig(r=4, target_modules=["0"], use_dora=True, **over))
    move(model)
    return model, model.get_base_model()[0]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_length_of_the_rows(name: str, dtype: torch.dtype, near: float) -> None:
    _, layer = dora(LAYERS[name](), dtype)
    w, adapter = layer.port.weight(), layer.adapters["default"]
    want = adapter._norm(w)
    assert far(adapter._factored(w) / want, torch.ones_like(want)) < near
    assert far(want, w.flatten(1).norm(dim=1)) > 1e-2, "the product moves them"


@pytest.mark.parametrize("left", [0.0, 1e-3, 0.1, 0.5])
def test_rows_that_all_but_cancel_keep_their_digits(left: float) -> None:
    """W + s B A = left x W in one row: the terms of the sum are then up to any number of times what is left of them."""
    model, layer = dora(nn.Linear(48, 40, bias=False))
    adapter = layer.adapters["default"]
    with torch.no_grad():
        added = adapter.lora.s * adapter.lora.lora_B.weight.double() @ adapter.lora.lora_A.weight.double()
        layer.base_layer.weight[3] = -added[3] / (1 - left)
        w = layer.port.weight()
        exact = (w + added).norm(dim=1)
        assert far(adapter._factored(w), exact) < 1e-6 * float(w[3].norm())
        if left:
            assert abs(float(adapter._factored(w)[3] / exact[3]) - 1) < max(1e-5, 1e-7 / left)
            x = torch.randn(5, 48)
            assert far(model(x), x @ layer.stack(("default",)).weight().T) < 1e-3
        assert torch.isfinite(adapter._factored(w)).all()


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that is made: no view, and no change in place."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        new = [t.numel() for t in tree_leaves(made) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in before]
        self.numbers = max([self.numbers, *new])
        return made


def test_a_step_makes_nothing_of_the_weight_s_size() -> None:
    model, layer = dora(nn.Linear(256, 512))
    x = torch.randn(8, 256)
    with Largest() as seen:
        model(x).square().mean().backward()
    assert seen.numbers == 8 * 512, "its own output"
    with Largest() as plain:
        layer.adapters["default"]._norm(layer.port.weight())
    assert plain.numbers == 256 * 512

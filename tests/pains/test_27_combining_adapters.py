"""A combination adds what its adapters do, not their factors: sum of w_i D_i, also for negative weights and other scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from situations import llama, lora, move
from torch import Tensor

from trimtab import get_peft_model

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one scale": ({"lora_alpha": 4}, {"lora_alpha": 4}),
    "other ranks and scales": ({"lora_alpha": 3}, {"r": 3, "lora_alpha": 7, "use_rslora": True}),
    "DoRA": ({}, {"use_dora": True}),
    "a bias on B": ({}, {"lora_bias": True}),
}


def deltas(model: Any, name: str) -> list[Tensor]:
    """What an adapter adds to the answers of each adapted layer."""
    model.set_adapter(name)
    model.eval()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    found = [m for m in model.modules() if type(m).__name__ == "AdapterLayer" and name in m.adapters]
    with torch.no_grad():
        return [m(x) - m.base_layer(x) for m in found]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (-1.0, 0.0), (0.7, -1.3)])
def test_the_sum_is_that_of_what_they_do(pair: str, weights: tuple[float, float]) -> None:
    first, second = PAIRS[pair]
    model = get_peft_model(llama(), lora(**first), "a")
    move(model)
    model.add_adapter("b", lora(**second))
    model.set_adapter("b")
    move(model, 5)
    model.add_weighted_adapter(["a", "b"], list(weights), "sum", "cat")
    for a, b, both in zip(deltas(model, "a"), deltas(model, "b"), deltas(model, "sum"), strict=True):
        assert torch.allclose(both, weights[0] * a + weights[1] * b, atol=1e-5) and both.abs().max() > 1e-3

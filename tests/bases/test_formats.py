"""Layers that show a dense weight, and layers that must not pretend to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab import LoraConfig, get_peft_model
from trimtab.core.base import Opaque, port
from trimtab.errors import NotMergeable, NotSupported


class Odd(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_a_layer_whose_weight_means_something_else_is_refused() -> None:
    for layer in (Odd(4, 4), nn.Embedding(5, 4, max_norm=1.0)):
        with pytest.raises(NotSupported):
            get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(port(nn.ReLU()), Opaque) and isinstance(port(nn.GRU(4, 4)), Opaque)


def test_a_grouped_convolution_shows_the_dense_weight_of_the_same_function() -> None:
    for groups, ins, outs in ((2, 4, 6), (3, 6, 3), (4, 4, 8)):
        layer = nn.Conv2d(ins, outs, 3, groups=groups)
        base, x = port(layer), torch.randn(2, ins, 5, 5)
        assert tuple(base.weight().shape) == base.shape == (outs, ins, 3, 3)
        plain = nn.functional.conv2d(x, base.weight(), layer.bias)
        assert torch.allclose(plain, layer(x), atol=1e-5)
        assert torch.equal(base.rebuild(base.weight(), base.bias()).weight, layer.weight)
        with pytest.raises(NotMergeable, match="mixes the groups"):
            base.rebuild(base.weight() + 1, base.bias())


def test_rebuilding_rounds_once_and_changes_nothing_of_the_old_layer() -> None:
    layer = nn.Linear(4, 3).bfloat16()
    base, before = port(layer), layer.weight.clone()
    target = torch.randn(3, 4)
    new = base.rebuild(base.weight().float() + target, None)
    assert torch.equal(new.weight, (before.float() + target).bfloat16()) and new.bias is None
    assert torch.equal(layer.weight, before) and layer.bias is not None and not new.weight.requires_grad

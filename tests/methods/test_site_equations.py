"""Trained norms and trained rows, written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab import LNTuningConfig, TrainableTokensConfig, get_peft_model
from trimtab.errors import ConfigError


def moved(model: Any, name: str, size: float = 0.3) -> dict[str, Tensor]:
    """What adapter `name` of the only layer trains, after a step off its start."""
    model.set_adapter(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
    return {k: v.detach() for k, v in model.get_base_model()[0].adapters[name].named_parameters()}


def test_ln_tuning_is_its_copy_and_two_add_up() -> None:
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(8).double(), torch.randn(3, 8).double()
    model = get_peft_model(nn.Sequential(norm), LNTuningConfig(target_modules=["0"]), "a")
    model.add_adapter("b", LNTuningConfig(target_modules=["0"]))
    a, b = moved(model, "a"), moved(model, "b")
    plain = nn.functional.layer_norm(x, (8,))
    model.set_adapter("a")
    assert (model(x) - plain * a["ln_tuning_layers.weight"] - a["ln_tuning_layers.bias"]).abs().max() < 1e-12
    model.set_adapter(["a", "b"])
    w, c = (a[f"ln_tuning_layers.{n}"] + b[f"ln_tuning_layers.{n}"] - getattr(norm, n) for n in ("weight", "bias"))
    want = plain * w + c
    assert (model(x) - want).abs().max() < 1e-12
    model.merge_adapter(["b"])
    assert (model(x) - want).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_trained_rows_take_the_place_of_the_frozen_ones(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(9, 4).double() if kind == "embedding" else nn.Linear(4, 9).double()
    model = get_peft_model(nn.Sequential(layer), TrainableTokensConfig(token_indices=[7, 2], target_modules=["0"]), "a")
    model.add_adapter("b", TrainableTokensConfig(token_indices=[2, 0], target_modules=["0"]))
    a, b = (moved(model, n)["trainable_tokens_delta"] for n in "ab")
    w = layer.weight.detach().clone()
    alone = w.clone()
    alone[[7, 2]] = a
    both = alone.clone()
    both[[2, 0]] += b - w[[2, 0]]
    x = torch.arange(9) if kind == "embedding" else torch.randn(5, 4).double()
    for names, weight in ((["a"], alone), (["a", "b"], both)):
        model.set_adapter(names)
        want = weight[x] if kind == "embedding" else x @ weight.T + layer.bias
        assert (model(x) - want).abs().max() < 1e-12


def test_a_gradient_reaches_the_trained_rows_alone() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 4)), TrainableTokensConfig(token_indices=[7, 2], target_modules=["0"]))
    model(torch.tensor([[7, 7, 1]])).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 1 and grads[0] is not None and grads[0].tolist() == [[2.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("ids", [[], [9], [-1], [3, 3]])
def test_tokens_that_are_not_there_are_refused(ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="ids below 9"):
        get_peft_model(nn.Sequential(nn.Embedding(9, 4)), TrainableTokensConfig(token_indices=ids, target_modules=["0"]))

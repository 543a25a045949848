"""Activations are computed again, the inputs are frozen: gradients are the same, and a graph that is cut is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from situations import tiny, trainer

from trimtab import LoraConfig, get_peft_model
from trimtab.errors import TrainingError
from trimtab.model import checkpoint_activations, prepare_model_for_kbit_training


@pytest.mark.parametrize("how", ["checkpoint_activations", "prepare_model_for_kbit_training"])
def test_gradients_are_equal(how: str) -> None:
    found = []
    for again in (False, True):
        base = tiny.llama()
        if again and how == "checkpoint_activations":
            checkpoint_activations(base)
        elif again:
            base = prepare_model_for_kbit_training(base)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
        with torch.no_grad():
            for i, p in enumerate(tiny.tensors(model).values()):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        batch = tiny.collate(tiny.rows(4))
        model.train()(**{k: v for k, v in batch.items() if k != "rows"}).loss.backward()
        found.append({name: p.grad for name, p in tiny.tensors(model).items()})
    assert all(g is not None and torch.allclose(g, found[1][name], atol=1e-6) for name, g in found[0].items())
    assert max(g.abs().max() for g in found[0].values()) > 1e-3


def test_a_graph_that_is_cut_is_named(tmp_path: Path) -> None:
    """The lower layer computes without a gradient: half of the adapter would stay as it is."""
    model = tiny.adapted()
    layer = model.get_base_model().model.layers[0]
    layer.forward = torch.no_grad()(layer.forward)
    with pytest.raises(TrainingError) as error:
        trainer(tmp_path, model).train()
    said = str(error.value)
    assert "14 of the trainable tensors" in said and "layers.0." in said and "layers.1." not in said
    assert "received no gradient in step 1" in said

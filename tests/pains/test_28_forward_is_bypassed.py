"""A layer whose weight the model reads past its forward: refused where it is known, found at step 1 where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from situations import Plain, lora, tiny, trainer
from torch import nn

from trimtab import get_peft_model
from trimtab.errors import NotSupported, TrainingError


def test_a_known_one_is_refused() -> None:
    with pytest.raises(NotSupported, match=r"nn\.MultiheadAttention reads this weight past the layer"):
        get_peft_model(Plain(attention=nn.MultiheadAttention(8, 2)), lora(task_type=None, target_modules=["out_proj"]))


def test_an_unknown_one_is_named_at_step_1(tmp_path: Path) -> None:
    model = tiny.adapted()
    mlp = model.get_base_model().model.layers[1].mlp
    weight = mlp.down_proj.base_layer.weight
    mlp.forward = lambda x: F.linear(torch.sigmoid(mlp.gate_proj(x)) * mlp.up_proj(x), weight)
    with pytest.raises(TrainingError) as error:
        trainer(tmp_path, model).train()
    said = str(error.value)
    assert "2 of the trainable tensors" in said and "layers.1.mlp.down_proj" in said and "Exclude it from the targets" in said

"""No. 43: an adapter trained on a 4-bit base merges into that base's values; what never merges says so and why."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from little import IDS, far, llama, move
from torch import nn

from trimtab import LoraConfig, PromptTuningConfig, get_peft_model
from trimtab.errors import NotMergeable


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_4_bit_layer_merges_to_a_plain_one() -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(32, 64) * 0.1, requires_grad=False, quant_type="nf4")
    host = nn.Sequential(layer.to("cpu"))
    model = get_peft_model(host, LoraConfig(r=4, target_modules=["0"]))
    move(model)
    model.eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = model(x)
        with model.disable_adapter():
            assert far(model(x), before) > 1e-1
        merged = model.merge_and_unload()
        assert type(merged[0]) is nn.Linear and far(merged(x), before) < 1e-4


def test_a_prompt_says_that_there_is_nothing_to_merge_into() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(NotMergeable, match="no weight to merge into. Keep the adapter folder beside the model"):
        model.merge_and_unload()
    assert model(input_ids=IDS).logits.isfinite().all()  # and goes on as it was

"""No. 43: an adapter trained on a 4-bit base merges into that base's values; what never merges says so and why."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from little import far
from small_llama import IDS, llama, move
from torch import nn

from trimtab import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from trimtab.errors import NotMergeable


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_it_merges_into_the_values_that_it_was_trained_on(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(32, 64) * 0.1, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    dense = nn.Linear(64, 32)
    dense.load_state_dict({"weight": dequantize_4bit(layer.weight.data, layer.weight.quant_state), "bias": layer.bias})
    tuned = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"]))
    move(tuned)
    tuned.save_pretrained(tmp_path)
    x = torch.randn(3, 64)
    with torch.no_grad():
        want, base = tuned.eval()(x), dense(x)
        merged = PeftModel.from_pretrained(nn.Sequential(dense), tmp_path).merge_and_unload()
        assert type(merged[0]) is nn.Linear and far(merged(x), want) < 1e-4 < 0.1 < far(base, want)
        tuned.merge_adapter()  # or stays in 4 bit, rounded once to their grid
        assert far(tuned(x), want) < 0.2 * far(base, want)


def test_a_prompt_says_that_there_is_nothing_to_merge_into() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(NotMergeable, match=r"no weight to merge into. Keep the adapter folder beside the model"):
        model.merge_and_unload()
    assert model(input_ids=IDS).logits.isfinite().all()  # and goes on as it was

"""No. 68: with adapters off the model is the base bit for bit: biases, saved modules, embeddings, tokens and prompts too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from little import far
from small_llama import llama, logits, move
from torch import nn

from trimtab import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trimtab.core.config import PeftConfig

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj"]),
    "all biases": lambda: LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "its biases": lambda: LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
    "a saved head": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved norms": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm", "norm"]),
    "tokens": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 9]),
    "embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
    "dora": lambda: LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def biased() -> nn.Module:
    model = llama(attention_bias=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("option", CONFIGS)
def test_to_the_bit(option: str) -> None:
    base = logits(biased())
    model = get_peft_model(biased(), CONFIGS[option]())
    move(model, size=0.4)
    model.eval()
    tuned = logits(model)
    assert far(tuned[:, -base.shape[1] :], base) > 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    assert torch.equal(logits(model.unload()), base)

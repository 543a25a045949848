"""What is saved is what was trained: biases, whole modules and embeddings, however the targets were spelt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from situations import llama, logits, lora, move

from trimtab import IA3Config, PeftModel, get_peft_model

FORMS: dict[str, Any] = {
    "bare": ["q_proj", "embed_tokens"],
    "dotted": ["self_attn.q_proj", "model.embed_tokens"],
    "regex": r"model\.(embed_tokens|layers\.\d\.self_attn\.q_proj)",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("whole", [None, ["lm_head"], ["lm_head", "model.norm"]], ids=["", "head", "head and norm"])
def test_lora(form: str, bias: str, whole: list[str] | None, tmp_path: Path) -> None:
    biased: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    model = get_peft_model(llama(**biased), lora(target_modules=FORMS[form], bias=bias, modules_to_save=whole))
    move(model)
    model.save_pretrained(tmp_path)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == numbers
    assert torch.equal(logits(PeftModel.from_pretrained(llama(**biased), tmp_path)), logits(model))


def test_a_method_without_factors(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama(), config)
    move(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model.eval()))

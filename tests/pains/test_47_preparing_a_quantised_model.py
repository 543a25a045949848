"""No. 47: preparing a model for training on few bits raises no weight to float32."""

from __future__ import annotations

import torch
from small_llama import llama

from trimtab import LoraConfig, get_peft_model, prepare_model_for_kbit_training


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


def test_no_byte_more_and_gradients_flow() -> None:
    model = llama().to(torch.bfloat16)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    model = prepare_model_for_kbit_training(model)
    assert bytes_of(model) == before and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    ids = torch.tensor([[5, 9, 4, 7]])
    tuned(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert len(trained) == 4 and all(p.dtype is torch.float32 and p.grad.abs().sum() > 0 for p in trained)
    assert bytes_of(tuned) == before

"""On a 16-bit base the trained tensors are float32, and so are their gradients: no scaler has anything to refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from situations import IDS, llama, lora

from trimtab import PeftModel, get_peft_model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_new_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(llama().to(dtype), lora())
    model.save_pretrained(tmp_path)
    for each in (model, PeftModel.from_pretrained(llama().to(dtype), tmp_path, is_trainable=True)):
        each(input_ids=IDS, labels=IDS).loss.backward()
        tensors = [p for p in each.parameters() if p.requires_grad]
        assert len(tensors) == 8 and {p.dtype for p in tensors} == {p.grad.dtype for p in tensors} == {torch.float32}
        assert {p.dtype for p in each.parameters() if not p.requires_grad} == {dtype}

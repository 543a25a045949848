"""No. 71: trained tokens are saved as their rows, and a trained embedding without the frozen one."""

from __future__ import annotations

from pathlib import Path

import torch
from small_llama import llama, logits, move

from trimtab import LoraConfig, PeftModel, get_peft_model

VOCABULARY, WIDTH = 2000, 16


def size(folder: Path, **fields: object) -> int:
    model = get_peft_model(llama(vocab_size=VOCABULARY), LoraConfig(r=2, **{"target_modules": ["q_proj"]} | fields))
    move(model)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(llama(vocab_size=VOCABULARY), folder)
    assert torch.equal(logits(again), logits(model.eval()))
    return (folder / "adapter_model.safetensors").stat().st_size


def test_it_grows_by_what_is_trained(tmp_path: Path) -> None:
    plain = size(tmp_path / "plain")
    tokens = size(tmp_path / "tokens", trainable_token_indices=[5, 9, 4])
    assert 3 * WIDTH * 4 <= tokens - plain < 3 * WIDTH * 4 + 400  # the rows, and their line in the header
    adapted = size(tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    assert 2 * (VOCABULARY + WIDTH) * 4 <= adapted - plain < 2 * (VOCABULARY + WIDTH) * 4 + 600
    assert adapted < plain + VOCABULARY * WIDTH * 4 / 2

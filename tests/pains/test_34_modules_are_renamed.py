"""An upgrade renamed the modules: the old file is refused, and read in full where the new names are said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from situations import llama, logits, lora, move

from trimtab import PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint


def test_old_and_new_names_give_the_same_logits(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    move(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old, new = "model.model.layers", "model.language_model.model.layers"
    save_file({k.replace(old, new): v for k, v in load_file(file).items()}, file)
    with pytest.raises(BadCheckpoint, match=r"8 missing: .*\n.*8 unexpected: .*language_model"):
        PeftModel.from_pretrained(llama(), tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, key_mapping={r"language_model\.": ""})
    assert torch.equal(logits(again), logits(model)) and len(again.load_report.loaded) == 8

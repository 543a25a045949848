"""A file whose keys are those of another layout would leave B at zero: the model would answer as the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from situations import llama, logits, lora, move

from trimtab import PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint

OLD, NEW = "base_model.model.model.layers.1.", "base_model.model.transformer.layers.1."


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    model = get_peft_model(llama(), lora())
    move(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace(OLD, NEW): v for k, v in load_file(file).items()}, file)
    return tmp_path


@pytest.mark.parametrize("entry", ["from_pretrained", "load_adapter", "set_peft_model_state_dict"])
def test_every_door_refuses_and_names_the_keys(entry: str, renamed: Path) -> None:
    from trimtab import set_peft_model_state_dict

    doors: dict[str, Any] = {
        "from_pretrained": lambda: PeftModel.from_pretrained(llama(), renamed),
        "load_adapter": lambda: get_peft_model(llama(), lora()).load_adapter(renamed, "mine"),
        "set_peft_model_state_dict": lambda: set_peft_model_state_dict(
            get_peft_model(llama(), lora()), load_file(renamed / "adapter_model.safetensors")
        ),
    }
    with pytest.raises(BadCheckpoint) as error:
        doors[entry]()
    said = str(error.value)
    assert "4 missing: " in said and "4 unexpected: " in said and said.count(NEW) >= 4
    assert f"nearest key of this model: {OLD}" in said and "Fix: " in said


def test_asked_not_to_be_strict_it_reports(renamed: Path) -> None:
    model = PeftModel.from_pretrained(llama(), renamed, strict=False)
    report = model.load_report
    assert (len(report.loaded), len(report.missing_keys), len(report.unexpected_keys)) == (4, 4, 4)


def test_the_old_layout_is_read_where_it_is_said(renamed: Path) -> None:
    model: Any = get_peft_model(llama(), lora())
    move(model)
    want = logits(model)
    again = PeftModel.from_pretrained(llama(), renamed, key_mapping={r"\.transformer\.layers": ".model.layers"})
    assert torch.equal(logits(again), want) and (want - logits(llama())).abs().max() > 1e-3

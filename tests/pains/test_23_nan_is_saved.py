"""A value that is not finite is never written: the tensor is named, and the file that stood there stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from situations import llama, logits, lora, move

from trimtab import PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_last_good_file_stays(value: float, tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    move(model)
    model.save_pretrained(tmp_path)
    want = logits(model)
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.q_proj.adapters["default"].lora_B.weight[3, 1] = value
    with pytest.raises(BadCheckpoint, match=r"layers\.0\.self_attn\.q_proj\.lora_B\.weight holds values that are not finite"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), want)

"""A sharded parameter has no values on this rank: nothing is written, and what stood there stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from situations import llama, logits, lora, move

from trimtab import PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint


def test_it_is_named_and_the_last_good_file_stays(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    move(model)
    model.save_pretrained(tmp_path)
    want = logits(model)
    part = model.get_base_model().model.layers[1].self_attn.v_proj.adapters["default"].lora_B
    whole, part.weight.data = part.weight.data, torch.empty(0)
    said = r"layers\.1\.self_attn\.v_proj\.lora_B\.weight has no values here \(its weights are sharded.*nothing was written"
    with pytest.raises(BadCheckpoint, match=said):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), want)
    part.weight.data = whole
    named = {n: p for n, p in model.state_dict(keep_vars=True).items() if p is part.weight}
    model.save_pretrained(tmp_path, state_dict={n: whole + 1 for n in named})  # as gathered from the ranks
    part.weight.data = whole + 1
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))

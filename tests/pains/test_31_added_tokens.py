"""Tokens were added to the model: the adapter comes back on a base of that size; on the pristine one the error names both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from situations import llama, lora, move

from trimtab import PeftModel, get_peft_model
from trimtab.errors import TrimtabError

NEW = torch.tensor([[37, 5, 38, 40]])


def longer() -> Any:
    model = llama()
    torch.manual_seed(1)
    model.resize_token_embeddings(41, mean_resizing=False)
    return model


@pytest.mark.parametrize("how", ["rows", "whole"])
def test_the_rows_come_back(how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rows": {"trainable_token_indices": [37, 38, 39, 40]},
        "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }[how]
    model = get_peft_model(longer(), lora(**options))
    move(model)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(longer(), tmp_path)(input_ids=NEW).logits, model(input_ids=NEW).logits)
    if how == "rows":
        kept = load_file(tmp_path / "adapter_model.safetensors")
        assert [v.shape for k, v in kept.items() if "token" in k] == [(4, 16)]
    with pytest.raises(TrimtabError, match=r"37|40"):
        PeftModel.from_pretrained(llama(), tmp_path)

"""A model that carries adapters is not wrapped again, and unload gives back the very model that came."""

from __future__ import annotations

import pytest
import torch
from situations import llama, logits, lora, move

from trimtab import get_peft_model
from trimtab.errors import ConfigError


def test_wrapping_again_points_to_add_adapter_and_unload_restores_all() -> None:
    base = llama()
    values = {k: v.clone() for k, v in base.state_dict().items()}
    kinds, before = [type(m) for m in base.modules()], logits(base)
    model = get_peft_model(base, lora(bias="all", modules_to_save=["lm_head"]))
    for wrapped in (model, base):
        with pytest.raises(ConfigError, match=r"carries adapters already.*Use add_adapter or load_adapter"):
            get_peft_model(wrapped, lora())
    move(model)
    assert not torch.equal(logits(model), before)
    plain = model.unload()
    assert plain is base and [type(m) for m in plain.modules()] == kinds and torch.equal(logits(plain), before)
    after = plain.state_dict()
    assert after.keys() == values.keys() and all(torch.equal(v, after[k]) for k, v in values.items())

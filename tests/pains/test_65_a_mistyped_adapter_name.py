"""No. 65: a name that no adapter has is an error that lists those there are, wherever a name is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_llama import IDS, llama, logits, move

from trimtab import LoraConfig, get_peft_model
from trimtab.errors import NoMatch

USES: list[Callable[[Any], Any]] = [
    lambda m: m.set_adapter("polit"),
    lambda m: m(input_ids=IDS, adapter_names=["polite", "polit"]),
    lambda m: m.generate(input_ids=IDS, adapter_names=["polit", "__base__"], max_new_tokens=1),
    lambda m: m.delete_adapter("polit"),
    lambda m: m.merge_adapter(["polit"]),
    lambda m: m.add_weighted_adapter(["polit"], [1.0], "new"),
]


@pytest.mark.parametrize("use", USES, ids=["set", "forward", "generate", "delete", "merge", "combine"])
def test_it_is_an_error_with_the_known_names(use: Callable[[Any], Any]) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "polite")
    move(model)
    model.eval()
    before = logits(model)
    with pytest.raises(NoMatch, match="polite"):
        use(model)
    assert torch.equal(logits(model), before) and model.active_adapters == ["polite"]

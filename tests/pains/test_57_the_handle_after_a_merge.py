"""No. 57: the result of merge_and_unload() was not kept, and the old object is used on."""

from __future__ import annotations

from pathlib import Path

import pytest
from little import far
from small_llama import IDS, llama, logits, move

from trimtab import LoraConfig, get_peft_model
from trimtab.errors import NoMatch


def test_the_old_handle_says_what_to_use(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    move(model)
    want = logits(model)
    plain = model.merge_and_unload()
    assert far(logits(plain), want) < 1e-5
    for use in (
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: model(input_ids=IDS),
        lambda: model.generate(input_ids=IDS, max_new_tokens=1),
    ):
        with pytest.raises(NoMatch, match=r"carries no adapter any more; go on with the model that merge_and_unload\(\)"):
            use()
    assert not (tmp_path / "out").exists()

"""An adapter that was loaded to answer is frozen: a trainer says so before step 1, with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from situations import tiny, trainer

from trimtab import PeftModel
from trimtab.errors import TrainingError


def test_it_is_said_with_the_fix_and_the_fix_trains(tmp_path: Path) -> None:
    tiny.adapted().save_pretrained(tmp_path / "adapter")
    with pytest.raises(TrainingError, match=r"no trainable parameter.*is_trainable=True"):
        trainer(tmp_path / "out", PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")).train()
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter", is_trainable=True)
    before = {n: p.detach().clone() for n, p in tiny.tensors(model).items()}
    trainer(tmp_path / "out", model, max_steps=2).train()
    assert all(not torch.equal(p, before[n]) for n, p in tiny.tensors(model).items())

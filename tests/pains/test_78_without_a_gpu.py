"""No. 78: a machine without a GPU trains, merges and answers, and the three agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from little import far, finished, said
from small_llama import logits

from trimtab import PeftModel
from trimtab.train.load import load_model


def test_train_merge_and_answer(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    from trimtab.export.merge import merge

    out = finished(tmp_path_factory)
    base = out.with_name("model")
    report, heard = said(merge, out, tmp_path / "merged")
    assert report.difference.agreement == 1 and "verified" in heard
    tuned = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), out)
    plain = load_model(tmp_path / "merged", dtype=torch.float32)
    assert {p.device.type for p in plain.parameters()} == {"cpu"}
    assert far(logits(plain), logits(tuned)) < 1e-4
    assert far(logits(plain), logits(load_model(base, dtype=torch.float32))) > 1e-3

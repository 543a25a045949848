"""No. 48: quantisers that are installed and broken are no concern of plain layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from little import far
from small_llama import llama, logits, move

from trimtab import LoraConfig, PeftModel, get_peft_model

BROKEN = ["awq", "gptqmodel", "auto_gptq", "hqq", "aqlm", "eetq", "torchao", "bitsandbytes"]


def test_plain_lora_wraps_merges_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = logits(llama())
    for name in BROKEN:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(f"raise ImportError('{name} of another version')")
        for known in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ImportError, match="awq of another version"):
        __import__("awq")
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    assert far(logits(model), want) == 0
    move(model)
    tuned = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert far(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), tuned) == 0
    assert far(logits(model.merge_and_unload()), tuned) < 1e-5
    assert not [m for m in sys.modules if m.partition(".")[0] in BROKEN]

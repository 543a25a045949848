"""An adapter that learnt on 4-bit weights is added to what their codes stand for, whether or not a run is recorded."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from situations import IDS, lora, move, write_model
from transformers import AutoModelForCausalLM

from trimtab import get_peft_model
from trimtab.errors import NotMergeable
from trimtab.export import merge as module
from trimtab.export.merge import find_source, merge
from trimtab.train.load import load_model

NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@NF4
def test_the_merged_model_answers_as_the_adapter_did_on_the_4_bit_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base")
    model = get_peft_model(load_model(str(base), dtype=torch.float32, load_in_4bit=True), lora(r=4))
    move(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
    assert json.loads((tmp_path / "adapter" / "trimtab.json").read_text())["base"]["load_in_4bit"] is True

    said = Console(file=io.StringIO(), width=300)
    report = merge(tmp_path / "adapter", tmp_path / "merged", console=said)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    plain = get_peft_model(load_model(str(base), dtype=torch.float32), lora(r=4))
    plain.load_adapter(tmp_path / "adapter", "default")
    with torch.no_grad():
        right, wrong = merged(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits
    spread = trained.std()
    assert report.load_in_4bit and report.difference.relative < 1e-2
    assert (right - trained).std() < 1e-2 * spread < (wrong - trained).std()  # the 16-bit base is another model

    monkeypatch.setattr(module, "dense_base", lambda source: load_model(str(source.base), dtype=torch.float32))
    with pytest.raises(NotMergeable, match=r"the merged model is not the adapter: logits differ by .* Nothing was written"):
        merge(tmp_path / "adapter", tmp_path / "other", console=said)
    assert not (tmp_path / "other").exists() and find_source(tmp_path / "adapter").load_in_4bit

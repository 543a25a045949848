"""The classic tutorial with only its import changed: it trains, and its checkpoints hold the adapter alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trimtab

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "train"))  # the tiny model is made there

import model_folder as made  # noqa: E402


@pytest.fixture(scope="module")
def tutorial() -> Any:
    spec = importlib.util.spec_from_file_location("tutorial", HERE.parents[1] / "examples" / "tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("four_bit", [True, False])
def test_tutorial(tutorial: Any, tmp_path: Path, four_bit: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows, out = made.write_model(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "out"
    lines = [{"instruction": f"say {i}", "input": "", "output": f"this is {i}"} for i in range(64)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = tutorial.main(str(folder), str(rows), str(out), load_in_4bit=four_bit, max_steps=3)
    assert "trainable params: 1,792 || all params: " in capsys.readouterr().out  # 2 layers, q (32, 32) and v (16, 32), r 8
    assert trainer.state.global_step == 3
    checkpoint = {f.name for f in (out / "checkpoint-3").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= checkpoint
    assert "model.safetensors" not in checkpoint
    ids = torch.tensor([[5, 6, 7, 8]])
    model = trainer.model.eval()
    wanted = model(ids).logits
    if not four_bit:  # quantising again is exact, but the kernel is not the question here
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        again = trimtab.PeftModel.from_pretrained(base, out)
        assert torch.equal(again(ids).logits, wanted)
    b = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert b.abs().max() > 0

"""The learning rate where none is given: by the width of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.train.test_run import lines, options, ran
from transformers import AutoConfig, GPT2Config, LlamaConfig, T5Config

from trimtab.train.rate import learning_rate


@pytest.mark.parametrize(("width", "rate"), [(4096, 2e-4), (8192, 1e-4), (2048, 4e-4), (576, 1.4e-3), (64, 2e-3)])
def test_the_rate_falls_as_the_model_widens(width: int, rate: float) -> None:
    assert learning_rate(LlamaConfig(hidden_size=width)) == rate


def test_the_width_is_found_under_each_familys_name() -> None:
    assert learning_rate(GPT2Config(n_embd=1024)) == 8e-4
    assert learning_rate(T5Config(d_model=512)) == 1.6e-3
    inner = LlamaConfig(hidden_size=2048)
    assert learning_rate(AutoConfig.for_model("llava", text_config=inner.to_dict())) == 4e-4


def test_a_run_takes_it_and_says_it(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    over = dict(learning_rate=None, max_steps=2, lr_scheduler_type="constant", val_size=0)
    _, said = ran(options(model_folder, rows, tmp_path / "out", **over))
    assert "constant from 0.002" in said
    assert [line["learning_rate"] for line in lines(tmp_path / "out" / "metrics.jsonl")] == [2e-3, 2e-3]
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["options"]["learning_rate"] == 2e-3

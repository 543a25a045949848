"""A step that is not finite is not taken, its rows are named, several in a row end the run, and nothing of it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch
from packed_runs import packed, stemmed
from safetensors.torch import load_file
from test_checkpoints import Stop
from test_trainer import trained

from trimtab.errors import BadCheckpoint, TrainingError, TrimtabWarning
from trimtab.train.callbacks import MetricsFile, read_metrics
from trimtab.train.trainer import Trainer

BAD = tiny.VOCABULARY - 1  # a token whose embedding is not a number


def rows(n: int, bad: set[int]) -> list[tiny.Example]:
    """Of which those numbered in `bad`, from 1, give a loss that is not finite."""
    found = tiny.rows(n)
    for e in found:
        e.input_ids = [BAD if e.line in bad and i == 0 else min(t, BAD - 1) for i, t in enumerate(e.input_ids)]
    return found


def model() -> Any:
    made = tiny.adapted()
    tiny.embedding(made).weight.data[BAD] = float("nan")
    return made


def run(folder: Path, examples: Any, *, layout: str, **over: Any) -> Trainer:
    if layout == "padded":
        return trained(folder, examples, model(), stop_after=3, **over)
    trainer = packed(folder, examples, model(), stop_after=3, **over)
    trainer.train()
    return trainer


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_step_is_left_out_and_the_others_are_as_without_it(tmp_path: Path, layout: str) -> None:
    with pytest.warns(TrimtabWarning, match=r"step 2: the loss is not finite for rows.jsonl:11 \(1 of the step's 8 rows\)"):
        trainer = run(tmp_path / "a", rows(24, {11}), layout=layout, max_steps=3)
    good = [e for e in rows(24, set()) if not 9 <= e.line <= 16]
    without = run(tmp_path / "b", good, layout=layout, max_steps=2)
    assert tiny.losses(trainer) == tiny.losses(without)
    assert all(torch.equal(p, tiny.tensors(without.model)[n]) for n, p in tiny.tensors(trainer.model).items())
    assert trainer.skipped.counts.steps == 1 and trainer.skipped.counts.in_a_row == 0
    assert trainer.state.global_step == 3
    steps = trainer.optimizer.state_dict()["state"]
    assert {float(s["step"]) for s in steps.values()} == {2.0}


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_three_in_a_row_end_the_run(tmp_path: Path, layout: str) -> None:
    examples = rows(48, {1, 10, 21, 33, 41})  # steps 1, 2 and 3, then 5 and 6
    with pytest.warns(TrimtabWarning), pytest.raises(TrainingError, match=r"step 3: .*rows.jsonl:21 .*3 such steps in a row"):
        run(tmp_path / "a", examples, layout=layout, save_strategy="steps", save_steps=3)
    assert not list((tmp_path / "a").glob("checkpoint-*"))
    with pytest.warns(TrimtabWarning) as said:
        trainer = run(tmp_path / "b", rows(48, {1, 10, 33, 41}), layout=layout, max_steps=6)
    assert ["2 of 3 in a row" in str(w.message) for w in said] == [False, True, False, True]
    assert trainer.skipped.counts.steps == 4 and trainer.skipped.counts.in_a_row == 2


def test_a_gradient_that_is_not_finite_is_left_out_too(tmp_path: Path) -> None:
    made, calls = tiny.adapted(), [0]
    tensor = next(iter(tiny.tensors(made).values()))

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return grad * float("inf") if calls[0] in (3, 4) else grad  # of step 2: two micro-batches each

    tensor.register_hook(spoil)
    with pytest.warns(TrimtabWarning, match=r"step 2: the gradient's norm is nan over the rows rows.jsonl:9, .* and 3 more"):
        trainer = trained(tmp_path, tiny.rows(24), made, stop_after=3, max_steps=3)
    assert trainer.skipped.counts.steps == 1 and len(tiny.losses(trainer)) == 2
    assert all(p.isfinite().all() for p in tiny.tensors(made).values())


def test_metrics_hold_no_number_that_is_not_one(tmp_path: Path) -> None:
    """The mean over three steps, of which one was not taken, is over the other two."""
    trainer = packed(tmp_path, rows(24, {11}), model(), stop_after=3, max_steps=3, logging_steps=3,
                     callbacks=[MetricsFile(tmp_path / "metrics.jsonl")])  # fmt: skip
    with pytest.warns(TrimtabWarning):
        trainer.train()
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found[0] == {"step": 2, "skipped_rows": ["rows.jsonl:11"], "epoch": found[0]["epoch"]}
    alone = packed(tmp_path / "b", rows(24, {11}), model(), stop_after=3, max_steps=3)
    with pytest.warns(TrimtabWarning):
        alone.train()
    assert found[1]["step"] == 3 and found[1]["loss"] == pytest.approx(sum(tiny.losses(alone)) / 2, abs=1e-6)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    examples, settings = rows(48, {1, 10, 21}), dict(save_strategy="steps", save_steps=1, max_steps=6)
    part = packed(tmp_path, examples, model(), stop_after=3, callbacks=[Stop(2)], **settings)
    with pytest.warns(TrimtabWarning):
        part.train()
    resumed = packed(tmp_path, examples, model(), stop_after=3, **settings)
    with pytest.raises(TrainingError, match=r"step 3: .*3 such steps in a row"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = load_file(tmp_path / "checkpoint-2" / "trainable.safetensors")
    assert all(t.isfinite().all() for t in saved.values())


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """However they came to be so."""
    trainer = packed(tmp_path, stemmed(16), save_strategy="steps", save_steps=2, max_steps=2, callbacks=[Spoil(2)])
    with pytest.raises((TrainingError, BadCheckpoint), match="not finite"):
        trainer.train()
    assert not list(tmp_path.glob("*checkpoint-*"))
    made = tiny.adapted()
    next(iter(tiny.tensors(made).values())).data.view(-1)[0] = math.inf
    with pytest.raises(BadCheckpoint, match="not finite; nothing was written"):
        made.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


class Spoil(Stop):
    def on_step_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        if state.global_step == self.step:
            next(iter(tiny.tensors(now["model"]).values())).data.view(-1)[0] = math.nan


def test_an_evaluation_that_is_not_finite_names_its_rows(tmp_path: Path) -> None:
    trainer = packed(tmp_path, None, model(), evaluated=rows(8, {5}))
    with pytest.raises(TrainingError, match=r"the loss of an evaluation is not finite for rows.jsonl:5$"):
        trainer.evaluate()


def test_json_lines_survive_a_machine_that_went_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(json.dumps({"step": 1}).encode() + b"\n\0\0\0\0\n" + b'{"step": 3}\n{"st')
    assert read_metrics(file) == [{"step": 1}]

"""A run that is interrupted and resumed is the uninterrupted run, bit for bit, or refuses and says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.train import checkpoint
from trimtab.train.trainer import Trainer

DROPOUT = {"lora_dropout": 0.2}


class Stop(TrainerCallback):
    """Ends the run after a step, as a kill between two steps does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def run(
    folder: Path, *, stop: int | None = None, resume: Path | None = None, seed: int = 0, rows: int = 24, **over: Any
) -> Trainer:
    settings = dict(
        max_steps=8,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=2,
        train_sampling_strategy="random",
    )
    trainer = Trainer(
        model=tiny.adapted(seed=seed, **DROPOUT),
        args=tiny.arguments(folder, **settings | over),
        train_dataset=tiny.rows(rows),
        data_collator=tiny.collate,
        callbacks=[Stop(stop)] if stop else [],
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.mark.parametrize("stop", [2, 4, 6])  # in an epoch, and between two: an epoch has three steps
def test_resuming_continues_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "part", stop=stop)
    torch.manual_seed(99)
    resumed = run(tmp_path / "part", resume=tmp_path / "part" / f"checkpoint-{stop}", seed=0)
    assert tiny.losses(resumed) == tiny.losses(whole)
    for name, tensor in tiny.tensors(whole.model).items():
        assert torch.equal(tensor, tiny.tensors(resumed.model)[name]), name
    mine, theirs = resumed.counts, whole.counts
    assert (mine.examples, mine.tokens, mine.supervised) == (theirs.examples, theirs.tokens, theirs.supervised)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2)
    folder = tmp_path / "checkpoint-2"
    assert {f.name for f in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        checkpoint.TENSORS,
        checkpoint.RECORD,
        "optimizer.safetensors",
        "rank_0.json",
        checkpoint.STATE,
    }
    assert not (folder / "model.safetensors").exists()
    base = sum(p.numel() * p.element_size() for p in tiny.base(trainer.model).parameters() if not p.requires_grad)
    assert (folder / "adapter_model.safetensors").stat().st_size < base / 2
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": 25}, "rows: "),
        ({"learning_rate": 3e-3}, "learning_rate: 0.01 there, 0.003 here"),
        ({"max_steps": 9}, "steps: 8 there, 9 here"),
        ({"gradient_accumulation_steps": 4}, "batch_size: 8 there, 16 here"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    run(tmp_path, stop=2)
    with pytest.raises(BadCheckpoint, match=said):
        run(tmp_path, resume=tmp_path / "checkpoint-2", **changed)


def test_resuming_with_another_adapter_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop=2)
    model = tiny.adapted(target_modules=["q_proj"])
    with pytest.raises(BadCheckpoint, match=r"only there: .*gate_proj"):
        checkpoint.load_tensors(model, tmp_path / "checkpoint-2")


def test_only_whole_checkpoints_are_found(tmp_path: Path) -> None:
    run(tmp_path, stop=4)
    assert checkpoint.to_resume("last", tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / checkpoint.RECORD).unlink()
    assert checkpoint.to_resume("last", tmp_path).name == "checkpoint-2"
    with pytest.raises(ConfigError, match=r"not a complete checkpoint folder. Checkpoints of .*: checkpoint-2"):
        checkpoint.to_resume(str(tmp_path / "checkpoint-4"), tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        checkpoint.to_resume("last", tmp_path)


def evaluated(folder: Path, **over: Any) -> Trainer:
    """A run whose learning rate is far too high after the first steps, so that its validation loss soon rises."""
    settings = dict(
        max_steps=8,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    patience = over.pop("patience", None)
    return Trainer(
        model=tiny.adapted(),
        args=tiny.arguments(folder, **settings | over),
        train_dataset=tiny.rows(64),
        eval_dataset=tiny.rows(16, seed=1),
        data_collator=tiny.collate,
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )


def test_the_best_model_is_restored(tmp_path: Path) -> None:
    trainer = evaluated(tmp_path)
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(seen) < seen[-1] - 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen), abs=1e-7)


def test_early_stopping(tmp_path: Path) -> None:
    trainer = evaluated(tmp_path, patience=2)
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = seen.index(min(seen))
    assert trainer.state.global_step == best + 3 < 8
    state = json.loads((tmp_path / f"checkpoint-{best + 1}" / checkpoint.STATE).read_text())
    assert state["best_global_step"] == best + 1

"""Optimizers of low-rank factors and starts that need data, in whole runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch
from rich.console import Console
from transformers import TrainerCallback

from trimtab import LoraConfig, PeftConfig, PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.methods.lora import LoRA
from trimtab.train.options import TrainOptions
from trimtab.train.run import run as whole_run
from trimtab.train.trainer import Trainer


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        control.should_training_stop = state.global_step == 2


def run(folder: Path, optim: str | None, *, stop: bool = False, resume: bool = False, **more: Any) -> Trainer:
    torch.manual_seed(0)
    cfg = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=more.get("init", True), task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(tiny.llama(), cfg),
        args=tiny.arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=3e-3),
        train_dataset=tiny.rows(24),
        data_collator=tiny.collate,
        callbacks=[Stop()] if stop else [],
        optim=optim,
        optim_options=more.get("options"),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


RUNS = [("loraplus", True), ("lorafa", "orthogonal"), ("riemannian", "pissa"), (None, "pissa")]


@pytest.mark.parametrize(("optim", "init"), RUNS)
def test_a_resumed_run_is_the_whole_run(optim: str | None, init: Any, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", optim, init=init)
    run(tmp_path / "part", optim, stop=True, init=init)
    resumed = run(tmp_path / "part", optim, resume=True, init=init)
    assert tiny.losses(resumed) == tiny.losses(whole)
    assert type(whole.optimizer.optimizer).__name__ == {
        "loraplus": "AdamW", "lorafa": "LoraFAOptimizer", "riemannian": "RiemannianAdamW", None: "AdamW"}[optim]  # fmt: skip
    mine, theirs = tiny.tensors(whole.model), tiny.tensors(resumed.model)
    assert mine.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in mine.items())
    assert any("lora_A" in n for n in mine) == (optim != "lorafa")
    whole.model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, whole.model.eval()(ids).logits)


def test_a_resumed_run_has_the_frozen_factors_of_the_first(tmp_path: Path) -> None:
    first = run(tmp_path, "lorafa", stop=True)
    want = [A.clone() for A in firsts(first)]
    saved = tmp_path / "checkpoint-2" / "trainable.safetensors"
    assert saved.stat().st_size > sum(t.numel() * 4 for t in want)
    resumed = run(tmp_path, "lorafa", resume=True)
    assert all(torch.equal(A, B) for A, B in zip(firsts(resumed), want, strict=True))


def firsts(trainer: Trainer) -> list[torch.Tensor]:
    return [m.lora_A.weight for m in trainer.model.modules() if isinstance(m, LoRA)]


def test_b_learns_faster_by_the_ratio(tmp_path: Path) -> None:
    trainer = run(tmp_path, "loraplus", options={"loraplus_lr_ratio": 4.0})
    rates = [g["initial_lr"] for g in trainer.optimizer.param_groups if g["params"]]
    assert rates == pytest.approx([3e-3, 1.2e-2])


def test_another_optimizer_does_not_resume(tmp_path: Path) -> None:
    run(tmp_path, "loraplus", stop=True)
    with pytest.raises(BadCheckpoint, match=r"optim: loraplus .*16\.0.* there"):
        run(tmp_path, "loraplus", resume=True, options={"loraplus_lr_ratio": 4.0})


def options(folder: Path, rows: Path, out: Path, **over: Any) -> TrainOptions:
    given: dict[str, Any] = dict(model=str(folder), dataset=[str(rows)], output_dir=str(out), batch_size=8, max_steps=4)
    return TrainOptions(**given | dict(learning_rate=3e-3, dtype="float32", compile="off") | over)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "pissa"])
def test_starts_see_the_training_rows_by_themselves(init: str, model_folder: Path, rows: Path, tmp_path: Path) -> None:
    chosen = options(model_folder, rows, tmp_path / "out", max_steps=10, learning_rate=1e-2,
                     adapter_options={"init_lora_weights": init, "r": 4})  # fmt: skip
    done = whole_run(chosen, console=Console(file=io.StringIO()))
    assert done.record.final_loss < done.record.first_loss  # type: ignore[operator]
    cfg: Any = PeftConfig.from_pretrained(tmp_path / "out")
    assert (cfg.init_lora_weights, cfg.r) == (("eva", 4) if init == "eva" else (True, 8))
    assert init != "eva" or cfg.rank_pattern


def test_loftq_on_a_4_bit_base_reads_the_model_folder(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    norms = {}
    for init in (True, "loftq"):
        chosen = options(model_folder, rows, tmp_path / str(init), load_in_4bit=True, max_steps=1, learning_rate=1e-5,
                         adapter_options={"init_lora_weights": init, "r": 16})  # fmt: skip
        done = whole_run(chosen, console=Console(file=io.StringIO()))
        norms[init] = sum(m.lora_B.weight.norm().item() for m in done.model.modules() if isinstance(m, LoRA))
    assert norms["loftq"] > 5 > 100 * norms[True]  # the first step moves B by 1e-5, LoftQ starts it from what 4 bits lose


@pytest.mark.parametrize("optim", ["loraplus", "lorafa", "riemannian"])
def test_optim_says_it_on_the_command_line(optim: str, model_folder: Path, rows: Path, tmp_path: Path) -> None:
    done = whole_run(options(model_folder, rows, tmp_path, optim=optim), console=Console(file=io.StringIO()))
    assert done.record.final_loss < done.record.first_loss  # type: ignore[operator]
    assert done.record.options["optim"] == optim


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"optim": "loraplu"}, "Did you mean 'loraplus'"),
        ({"loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio is an option of optim loraplus, and optim is adamw_torch_fused"),
        ({"optim": "lorafa", "riemannian_reg": 0.1}, "riemannian_reg is an option of optim riemannian"),
        ({"optim": "loraplus", "loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio"),
    ],
    ids=str,
)
def test_options_of_another_are_refused(over: Any, message: str, model_folder: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        whole_run(options(model_folder, rows, tmp_path, **over), console=Console(file=io.StringIO()))

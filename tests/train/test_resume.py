"""A resumed run is the uninterrupted one in every part that a run has; another run is refused, and what differs is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch
from model_folder import tokenizer
from packed_runs import packed, stemmed
from test_checkpoints import Stop
from test_run import lines, options, ran

from trimtab.core.group import groups
from trimtab.errors import BadCheckpoint, ConfigError, TrainingError, TrimtabWarning
from trimtab.train import batches, checkpoint
from trimtab.train.trainer import Trainer

DROPOUT = {"lora_dropout": 0.2}


def run(folder: Path, *, stop: int | None = None, resume: int | None = None, model: Any = None, rows: Any = None,
        tokens: int = 200, **over: Any) -> Trainer:  # fmt: skip
    """Eight steps in packs over 24 rows, three steps an epoch, in random order, with dropout."""
    settings = dict(max_steps=8, lr_scheduler_type="cosine", save_strategy="steps", save_steps=1,
                    train_sampling_strategy="random")  # fmt: skip
    trainer = packed(
        folder, stemmed(24) if rows is None else rows, tiny.adapted(**DROPOUT) if model is None else model, tokens=tokens,
        callbacks=[Stop(stop)] if stop else [], **settings | over,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return trainer


def identical(mine: Trainer, theirs: Trainer) -> None:
    """The trained tensors, the optimizer's state, what random numbers follow, all that was logged."""
    logged = [[{k: v for k, v in e.items() if "per_second" not in k and "time" not in k} for e in t.state.log_history
               if "train_loss" not in e] for t in (mine, theirs)]  # fmt: skip
    assert logged[0] == logged[1]
    for name, tensor in checkpoint.kept(theirs.model).items():
        assert checkpoint.same(checkpoint.kept(mine.model)[name], tensor), name
    states = [t.optimizer.state_dict()["state"] for t in (mine, theirs)]
    assert states[0].keys() == states[1].keys()
    for i, entries in states[1].items():
        assert all(torch.equal(states[0][i][k], v) for k, v in entries.items())


# ---- the same


@pytest.mark.parametrize("at", [2, 3, 6, 8])  # in an epoch, at the ends of two, at the end of the run
@pytest.mark.parametrize("logging", [1, 4])
def test_whatever_the_step_with_evaluations_and_logs_between(tmp_path: Path, at: int, logging: int) -> None:
    over = dict(evaluated=stemmed(6, seed=5), eval_strategy="epoch", logging_steps=logging)
    whole = run(tmp_path / "whole", **over)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{at}", tmp_path / "part" / f"checkpoint-{at}")
    torch.manual_seed(99)
    resumed = run(tmp_path / "part", resume=at, **over)
    assert resumed.state.global_step == 8
    identical(resumed, whole)


def test_evaluations_change_nothing_of_the_training(tmp_path: Path) -> None:
    plain = run(tmp_path / "a")
    often = run(tmp_path / "b", evaluated=stemmed(6, seed=5), eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert tiny.losses(often) == tiny.losses(plain)


def test_a_budget_that_memory_has_halved_stays_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packs would be other sums: the same, up to rounding."""
    def tight(folder: Path, **over: Any) -> Trainer:
        from trimtab.train import packing

        real, calls = packing.Packing.packs, [0]

        def packs(self: Any, examples: Any) -> Any:
            calls[0] += 1
            if self.tokens == 200 and calls[0] > 3:  # in the third step
                raise MemoryError("out of memory")
            return real(self, examples)

        with monkeypatch.context() as patch:
            patch.setattr(packing.Packing, "packs", packs)
            return run(folder, per_device_train_batch_size=8, gradient_accumulation_steps=1, **over)

    whole = tight(tmp_path / "whole")
    assert whole.packing is not None and whole.packing.tokens == 100
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "part" / "checkpoint-5")
    resumed = run(tmp_path / "part", resume=5, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    assert resumed.packing is not None and resumed.packing.tokens == 100
    identical(resumed, whole)


def test_an_optimizer_whose_state_is_wider_than_its_tensors(tmp_path: Path) -> None:
    """torch casts what it loads to the dtype of the parameter, which would round float32 moments of bfloat16 tensors."""
    def go(folder: Path, **over: Any) -> Trainer:
        model = tiny.adapted(**DROPOUT).to(torch.bfloat16)
        return run(folder, model=model, optim="adafactor", learning_rate=1e-1, **over)

    whole = go(tmp_path)
    entries = next(iter(whole.optimizer.state_dict()["state"].values()))
    assert torch.float32 in {v.dtype for v in entries.values() if isinstance(v, torch.Tensor) and v.dim()}
    resumed = go(tmp_path, resume=4)
    assert tiny.losses(resumed) == tiny.losses(whole)
    states = [t.optimizer.state_dict()["state"] for t in (resumed, whole)]
    for i, values in states[1].items():
        for key, value in values.items():
            other = states[0][i][key]
            assert checkpoint.same(other, value) if isinstance(value, torch.Tensor) else other == value, key


def test_the_order_of_parameters_does_not_matter(tmp_path: Path) -> None:
    whole = run(tmp_path)

    class Turned(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            made = super().create_optimizer(model)
            for group in made.param_groups:
                group["params"].reverse()
            return made

    model = tiny.adapted(**DROPOUT)
    trainer = packed(tmp_path, stemmed(24), model, tokens=200, max_steps=8, lr_scheduler_type="cosine",
                     save_strategy="no", train_sampling_strategy="random")  # fmt: skip
    trainer.__class__ = Turned
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert tiny.losses(trainer) == tiny.losses(whole)
    assert all(torch.equal(p, tiny.tensors(whole.model)[n]) for n, p in tiny.tensors(model).items())


def test_what_an_adapter_holds_frozen_comes_back_too(tmp_path: Path) -> None:
    """As the random A of a LoRA that trains B alone, in a process that drew another one."""
    def model(seed: int) -> Any:
        made = tiny.adapted(**DROPOUT)
        torch.manual_seed(seed)
        for _, adapter in groups(made.get_base_model())["default"].sites():
            adapter.lora_A.weight.data.normal_()
            adapter.lora_A.weight.requires_grad_(False)
        return made

    whole = run(tmp_path, model=model(1))
    resumed = run(tmp_path, model=model(2), resume=4)
    assert tiny.losses(resumed) == tiny.losses(whole)
    identical(resumed, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_data_workers_changes_nothing(tmp_path: Path, workers: int) -> None:
    alone = run(tmp_path / "a", max_steps=4, save_strategy="no")
    shared = run(tmp_path / "b", max_steps=4, save_strategy="no", dataloader_num_workers=workers)
    identical(shared, alone)


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path: Path) -> None:
    first = run(tmp_path / "a", max_steps=4, save_strategy="no")
    torch.rand(5)
    identical(run(tmp_path / "b", max_steps=4, save_strategy="no"), first)
    assert tiny.losses(run(tmp_path / "c", max_steps=4, save_strategy="no", seed=7)) != tiny.losses(first)


def test_other_conditions_are_said(tmp_path: Path) -> None:
    run(tmp_path, stop=2)
    with pytest.warns(TrimtabWarning, match=r"layout: 4 rows x 2, packs .* there, 8 rows x 1, .* results differ by rounding"):
        run(tmp_path, resume=2, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=8)


# ---- refused


def changed_answer(rows: list[Any]) -> list[Any]:
    rows[16] = replace(rows[16], input_ids=[*rows[16].input_ids[:-1], 5 + rows[16].input_ids[-1] % 7])
    return rows


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": changed_answer(stemmed(24))}, r"rows: 24 there, 24 here; the first that differs is rows.jsonl:17"),
        ({"rows": stemmed(25)}, r"rows: 24 there, 25 here; the first 24 are the same"),
        ({"rows": stemmed(24)[::-1]}, r"rows: 24 there, 24 here; the first that differs is rows.jsonl:24"),
        ({"evaluated": stemmed(4)}, r"validation rows: none, or a stream, there, 4 here"),
        ({"lr_scheduler_type": "linear"}, r"lr_scheduler_type: SchedulerType.COSINE there, SchedulerType.LINEAR here"),
        ({"learning_rate": 1e-3, "weight_decay": 0.1}, r"learning_rate: 0.01 there, 0.001 here; weight_decay: 0.0 there, 0.1"),
        ({"max_steps": 9}, r"steps: 8 there, 9 here"),
        ({"adam_beta2": 0.9}, r"adam_beta2: 0.999 there, 0.9 here"),
        ({"train_sampling_strategy": "sequential"}, r"train_sampling_strategy: random there, sequential here"),
        ({"model": tiny.adapted(lora_dropout=0.2, lora_alpha=16)}, r"lora_alpha of adapter 'default': 8 there, 16 here"),
        ({"model": tiny.adapted()}, r"lora_dropout of adapter 'default': 0.2 there, 0.0 here"),
        ({"model": tiny.adapted(lora_dropout=0.2, r=8)}, r"r of adapter 'default': 4 there, 8 here"),
    ],
    ids=["a row", "more rows", "order", "validation", "schedule", "rate", "steps", "beta", "shuffle", "alpha", "dropout", "r"],
)  # fmt: skip
def test_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    run(tmp_path, stop=2)
    with pytest.raises(BadCheckpoint, match=said + r".*start a new run from its weights: --init_adapter"):
        run(tmp_path, resume=2, **changed)


def test_another_trainable_set_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop=2)
    model = tiny.adapted(**DROPOUT)
    frozen = next(n for n in tiny.tensors(model) if n.endswith("lora_B.weight"))
    tiny.tensors(model)[frozen].requires_grad_(False)
    resumed = packed(tmp_path, stemmed(24), model, max_steps=8, lr_scheduler_type="cosine", save_strategy="no",
                     train_sampling_strategy="random", tokens=200)  # fmt: skip
    with pytest.raises(BadCheckpoint, match=rf"the optimizer held other tensors .*only there: {frozen}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(BadCheckpoint, match=r"lora_A.weight: float32 there, bfloat16 here"):
        run(tmp_path, resume=2, model=tiny.adapted(**DROPOUT).to(torch.bfloat16))


def test_another_template_is_refused(tmp_path: Path) -> None:
    def go(template: str, resume: int | None = None) -> None:
        made = tokenizer()
        made.chat_template = template
        trainer = packed(tmp_path, stemmed(24), max_steps=2, save_strategy="steps", save_steps=1)
        trainer.processing_class = made
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resume}") if resume else None)

    text = "{% for m in messages %}\n<|im_start|>{{ m.role }} {{ m.content }}\n{% endfor %}"
    go(text)
    go(text, resume=1)
    with pytest.raises(BadCheckpoint, match=r"template: line 2 reads '.*m.role }} .*' there, '.*m.role }}: .*' here"):
        go(text.replace("m.role }} ", "m.role }}: "), resume=1)


def test_weights_alone_are_no_checkpoint_to_continue_from(tmp_path: Path) -> None:
    run(tmp_path, stop=2, save_only_model=True)
    with pytest.raises(BadCheckpoint, match=r"weights alone \(save_only_model\)"):
        run(tmp_path, resume=2)


def test_a_refused_resume_leaves_the_folder_as_it_was(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    """Its checkpoints above all."""
    first = options(model_folder, rows, tmp_path, save_steps=2, val_size=0, max_steps=6)
    ran(first)
    shutil.rmtree(tmp_path / "checkpoint-6")

    def content() -> dict[str, bytes]:
        return {str(f): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    before = content()
    assert any("checkpoint-4" in name for name in before)
    for changed in ({"learning_rate": 1e-3}, {"max_steps": 7}, {"adapter_options": {"r": 4}}, {"dataset": [str(rows)] * 2}):
        with pytest.raises(BadCheckpoint, match="cannot be continued"):
            ran(replace(first, resume_from_checkpoint="last", **changed))
        assert content() == before


# ---- shown on the user's own run


def test_verify_resume(model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.train import verify

    over: dict[str, Any] = dict(val_size=0, max_steps=4, verify_resume=True, adapter_options={"lora_dropout": 0.2})
    given = options(model_folder, rows, tmp_path / "out", **over)
    _, said = ran(given)
    assert "resume    4 steps, and again from the checkpoint of step 2 in a new process: " in said
    assert "are the same, byte for byte" in said and "step 4/4: loss" in said
    assert not (tmp_path / "out" / verify.SCRATCH).exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "completed"
    assert len(lines(tmp_path / "out" / "metrics.jsonl")) == 4

    process = verify._process

    def other(options: Any, folder: Path, resume: Path | None) -> dict[str, Any]:
        """The second process does not begin where the first stood."""
        if resume is None:
            return process(options, folder, None)
        found = process(options, folder, resume)
        path = folder / "checkpoint-4" / checkpoint.TENSORS
        tensors = checkpoint.read_tensors(path)
        next(iter(tensors.values())).view(-1)[0] += 1e-3
        checkpoint.write_tensors(path, tensors)
        return found | {"losses": [[3, 1.0], [4, 1.0]]}

    monkeypatch.setattr(verify, "_process", other)
    with pytest.raises(TrainingError, match=r"1 of 28 tensors in trainable.safetensors, first .*, by 0.001 .*; losses, "):
        ran(replace(given, output_dir=str(tmp_path / "deep" / "out")))
    assert not (tmp_path / "deep").exists()


def test_verify_resume_is_for_one_process(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ranks", lambda: 2)
    with pytest.raises(ConfigError, match="verify_resume starts processes of its own"):
        ran(options(model_folder, rows, tmp_path, verify_resume=True))

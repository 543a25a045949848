"""Training in packs is training, row by row: the same losses, weights, evaluation, counts and checkpoints."""

from __future__ import annotations

import importlib
import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
import model_folder as made
import pytest
import tiny_llama as tiny
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

import trimtab
from trimtab.core.config import config_for
from trimtab.core.group import Group
from trimtab.engine.forward import Engine
from trimtab.errors import BadCheckpoint, DataError, TrainingError
from trimtab.model import get_peft_model
from trimtab.train import layouts
from trimtab.train.batches import Collator, Together
from trimtab.train.options import TrainOptions
from trimtab.train.packing import Packing
from trimtab.train.run import RunResult, run
from trimtab.train.trainer import Trainer

STEM = [random.Random(9).randint(3, tiny.VOCABULARY - 1) for _ in range(40)]


def rows(n: int, seed: int = 0) -> list[tiny.Example]:
    """Ragged rows, of which three in four begin with the same forty tokens; one in eight is the row before once more."""
    found = tiny.rows(n, seed)
    for i, e in enumerate(found):
        if i % 4:
            e.input_ids, e.supervised = [*STEM, *e.input_ids], [i % 8 == 3] * len(STEM) + e.supervised
        if i % 8 == 7:
            e.input_ids, e.supervised = found[i - 1].input_ids, found[i - 1].supervised
    return found


def packed(folder: Path, examples: Any, model: Any = None, *, share: bool = True, most: int | None = None,
           tokens: int = 1024, evaluated: Any = None, callbacks: Any = (), **over: Any) -> Trainer:  # fmt: skip
    model = model if model is not None else tiny.adapted()
    return Trainer(
        model=model, args=tiny.arguments(folder, **over), train_dataset=examples, eval_dataset=evaluated,
        data_collator=Together(), packing=Packing(Engine(model), tokens, rows=most, share=share), callbacks=[*callbacks],
    )  # fmt: skip


def trained(*args: Any, resume: Path | None = None, **over: Any) -> Trainer:
    trainer = packed(*args, **over)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def padded(folder: Path, examples: Any, **over: Any) -> Trainer:
    trainer = Trainer(
        model=tiny.adapted(), args=tiny.arguments(folder, **over), train_dataset=examples, data_collator=tiny.collate
    )
    trainer.train()
    return trainer


def equal(mine: Any, theirs: Any) -> None:
    for name, tensor in tiny.tensors(theirs).items():
        assert torch.allclose(tiny.tensors(mine)[name], tensor, atol=2e-5), name


# ---- the same steps


def test_five_steps_equal_a_plain_loop_and_padded_batches(tmp_path: Path) -> None:
    examples, model = rows(40), tiny.adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    expected = []
    for step in range(5):
        loss = tiny.one_by_one(model, examples[8 * step : 8 * step + 8])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    trainer = trained(tmp_path / "a", examples)
    assert tiny.losses(trainer) == pytest.approx(expected, abs=2e-6)
    assert expected[0] - expected[-1] > 1e-3
    equal(trainer.model, model)
    other = padded(tmp_path / "b", examples)
    assert tiny.losses(trainer) == pytest.approx(tiny.losses(other), abs=2e-6)
    equal(trainer.model, other.model)
    assert trainer.counts.tokens == other.counts.tokens and trainer.counts.supervised == other.counts.supervised
    assert trainer.counts.computed < 0.75 * trainer.counts.tokens < trainer.counts.tokens < other.counts.computed


@pytest.mark.parametrize(("micro", "accumulate"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize(("tokens", "most", "share"), [(1024, None, True), (100, None, True), (1024, 3, True), (90, 1, False)])
def test_no_layout_of_a_step_changes_it(
    tmp_path: Path, micro: int, accumulate: int, tokens: int, most: int | None, share: bool
) -> None:
    examples = rows(19)  # the last step of an epoch is a short one
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
    found = trained(tmp_path, examples, max_steps=3, tokens=tokens, most=most, share=share, **split)
    assert tiny.losses(found) == pytest.approx(EXPECTED(tmp_path), abs=1e-6)
    assert found.counts.examples == 19
    assert found.counts.tokens == sum(len(e.input_ids) for e in examples)
    assert found.counts.supervised == sum(sum(e.supervised[1:]) for e in examples)
    assert share or found.counts.computed == found.counts.tokens


_expected: list[float] = []


def EXPECTED(folder: Path) -> list[float]:
    if not _expected:
        _expected.extend(tiny.losses(padded(folder / "expected", rows(19), max_steps=3)))
    return _expected


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    examples = rows(16)
    plain = trained(tmp_path / "a", examples, max_steps=2)
    model = tiny.adapted(checkpointing=True)
    assert tiny.losses(trained(tmp_path / "b", examples, model, max_steps=2)) == pytest.approx(tiny.losses(plain), abs=1e-6)


def test_mixed_precision_is_that_of_padded_batches(tmp_path: Path) -> None:
    """A float32 model under bfloat16 autocast."""
    found = trained(tmp_path / "a", rows(24), bf16=True)
    other = padded(tmp_path / "b", rows(24), bf16=True)
    exact = padded(tmp_path / "c", rows(24))
    assert tiny.losses(found) == pytest.approx(tiny.losses(other), abs=5e-3)
    assert tiny.losses(found) != pytest.approx(tiny.losses(exact), abs=1e-6), "autocast was on"


def test_a_penalty_counts_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "penalty", lambda self: sum(a.lora_A.weight.square().sum() for _, a in self.sites()))
    examples, model = rows(16), tiny.adapted()
    with torch.no_grad():
        squares = sum(p.square().sum().item() for name, p in tiny.tensors(model).items() if "lora_A" in name)
        expected = tiny.one_by_one(model, examples[:8]).item() + squares
    for tokens in (1024, 64):
        model = tiny.adapted()
        assert tiny.losses(trained(tmp_path / str(tokens), examples, model, max_steps=1, tokens=tokens)) == pytest.approx(
            [expected], abs=1e-5
        )


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_evaluation_does_not_depend_on_its_batch(tmp_path: Path, batch: int, tokens: int) -> None:
    examples, model = rows(21), tiny.adapted()
    trainer = packed(tmp_path, None, model, tokens=tokens, evaluated=examples, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    with torch.no_grad():
        counts = [sum(e.supervised[1:]) for e in examples]  # nothing predicts a first token
        wanted = sum(float(tiny.one_by_one(model, [e])) * n for e, n in zip(examples, counts, strict=True)) / sum(counts)
    assert metrics["eval_loss"] == pytest.approx(wanted, abs=1e-6)
    assert metrics["eval_supervised_tokens"] == sum(counts)


def test_logits_are_there_where_they_are_asked_for(tmp_path: Path) -> None:
    """By `predict`, and by an evaluation with metrics of one's own: those batches are padded."""
    examples = rows(5)
    trainer = packed(tmp_path, None, evaluated=examples, per_device_eval_batch_size=2)
    found = trainer.predict(examples)
    longest = max(len(e.input_ids) for e in examples)
    assert found.predictions.shape == (5, longest, tiny.VOCABULARY) and found.label_ids.shape == (5, longest)
    with torch.no_grad():
        alone = trainer.model(input_ids=torch.tensor([examples[1].input_ids])).logits[0]
    assert torch.allclose(torch.tensor(found.predictions[1, : len(alone)]), alone, atol=1e-5)
    trainer.compute_metrics = lambda p: {"rows": len(p.predictions)}
    assert trainer.evaluate()["eval_rows"] == 5


# ---- what is wrong stops


def test_labels_that_are_other_tokens_are_refused(tmp_path: Path) -> None:
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    for wrong in ({"labels": [6, 7, -100]}, {"labels": [-100, 6]}, {"input_ids": [], "labels": []},
                  {"labels": [-100, 6, 7], "attention_mask": [1, 1, 0]}, {"attention_mask": [1, 1]}):  # fmt: skip
        with pytest.raises(DataError, match="row 2 of a batch"):
            Together()([good, good | wrong])
    with pytest.raises(DataError, match=r"not shifted.* or pass a data_collator of your own"):
        trained(tmp_path, [good, good | {"labels": [6, 7, -100]}] * 8)


def test_what_an_attention_mask_hides_is_left_out() -> None:
    row = {"input_ids": [0, 0, 5, 6, 7, 0], "labels": [-100, -100, -100, 6, 7, -100], "attention_mask": [0, 0, 1, 1, 1, 0]}
    (found,) = Together()([row])["examples"]
    assert found.input_ids == [5, 6, 7] and found.supervised == [False, True, True]
    tensors = {name: torch.tensor(value) for name, value in row.items()}
    assert Together()([tensors])["examples"] == [found]


def test_a_loss_that_is_not_finite_names_its_rows_and_saves_nothing(tmp_path: Path) -> None:
    examples, model = tiny.rows(16), tiny.adapted()
    for e in examples:
        e.input_ids[1:] = [min(t, 59) for t in e.input_ids[1:]]
        e.input_ids[0] = 60 if e in (examples[10], examples[13]) else 5
    tiny.embedding(model).weight.data[60] = float("nan")
    with pytest.raises(TrainingError, match=r"step 2: the loss is not finite for rows.jsonl:11, rows.jsonl:14 \(2 of the 8"):
        trained(tmp_path, examples, model, per_device_train_batch_size=8, gradient_accumulation_steps=1,
                save_strategy="steps", save_steps=2)  # fmt: skip
    assert not [*tmp_path.iterdir()]
    assert tiny.base(model).config._attn_implementation == "sdpa"


def test_a_step_without_labels_names_its_rows(tmp_path: Path) -> None:
    examples = rows(16)
    for e in examples[8:]:
        e.supervised = [True] + [False] * (len(e.input_ids) - 1)  # nothing predicts a first token
    with pytest.raises(TrainingError, match=r"step 2: no supervised token in the rows rows.jsonl:9, "):
        trained(tmp_path, examples)


def test_a_module_that_is_bypassed_is_named(tmp_path: Path) -> None:
    model = tiny.adapted()
    tiny.base(model).model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\..* received no gradient in step 1"):
        trained(tmp_path, rows(8), model)


# ---- checkpoints


class Stop(TrainerCallback):
    """Ends the run after a step, as a kill between two steps does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_resuming_continues_bit_for_bit(tmp_path: Path) -> None:
    def go(folder: Path, **over: Any) -> Trainer:
        settings = dict(max_steps=6, lr_scheduler_type="cosine", save_strategy="steps", save_steps=2, tokens=200,
                        train_sampling_strategy="random")  # fmt: skip
        return trained(folder, rows(24), tiny.adapted(lora_dropout=0.2), **settings | over)

    whole = go(tmp_path / "whole")
    go(tmp_path / "part", callbacks=[Stop(4)])
    torch.manual_seed(99)
    resumed = go(tmp_path / "part", resume=tmp_path / "part" / "checkpoint-4")
    assert tiny.losses(resumed) == tiny.losses(whole)
    for name, tensor in tiny.tensors(whole.model).items():
        assert torch.equal(tensor, tiny.tensors(resumed.model)[name]), name
    mine, theirs = ({**vars(t.counts), "seconds": 0} for t in (resumed, whole))
    assert mine == theirs and mine["computed"] < mine["tokens"]
    with pytest.raises(BadCheckpoint, match="rows: "):
        trained(tmp_path / "part", rows(25), tiny.adapted(lora_dropout=0.2), max_steps=6, save_strategy="steps",
                save_steps=2, lr_scheduler_type="cosine", resume=tmp_path / "part" / "checkpoint-4")  # fmt: skip


# ---- a Trainer that is left to choose


def mappings(examples: list[tiny.Example], **more: Any) -> list[dict[str, Any]]:
    return [{"input_ids": e.input_ids, "labels": e.labels, **more} for e in examples]


def alone(folder: Path, dataset: Any, model: Any = None, kind: type[Trainer] = Trainer, **over: Any) -> Trainer:
    """`trimtab.Trainer(model, args, train_dataset=rows)`."""
    model = model if model is not None else tiny.adapted()
    given = {k: over.pop(k) for k in ("data_collator", "compute_loss_func", "eval_dataset", "compute_metrics") if k in over}
    return kind(model, tiny.arguments(folder, **over), train_dataset=dataset, **given)


@pytest.mark.parametrize("form", ["examples", "mappings", "padded mappings", "dataset"])
def test_a_trainer_packs_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    examples: Any = rows(16)
    if form == "examples":
        data: Any = [trimtab.data.Example(e.input_ids, e.supervised, e.source, e.line) for e in examples]
    elif form == "padded mappings":
        batch = tiny.collate(examples)
        data = [{k: batch[k][i].tolist() for k in ("input_ids", "attention_mask", "labels")} for i in range(16)]
    else:
        data = mappings(examples, text="what it was before")
        data = datasets.Dataset.from_list(data) if form == "dataset" else data
    trainer = alone(tmp_path / "a", data, max_steps=2, remove_unused_columns=True, eval_dataset=data)
    said = capsys.readouterr().out
    assert said == "layout: packs of up to 2,048 tokens; what examples begin with in common is computed once\n"
    trainer.train()
    other = padded(tmp_path / "b", examples, max_steps=2)
    assert tiny.losses(trainer) == pytest.approx(tiny.losses(other), abs=2e-6)
    assert trainer.counts.computed < trainer.counts.tokens == other.counts.tokens
    with torch.no_grad():
        wanted = tiny.one_by_one(trainer.model, examples).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-5)


def gpt2(**over: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **over)
    model = GPT2LMHeadModel(config)
    return get_peft_model(model, config_for("lora", task_type="CAUSAL_LM", target_modules=["c_attn"]))


def test_a_model_that_cannot_be_packed_is_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = alone(tmp_path, mappings(rows(16)), gpt2(attn_pdrop=0.1, resid_pdrop=0.0, embd_pdrop=0.0), max_steps=2)
    said = capsys.readouterr().out
    assert said == "layout: padded batches: its attention drops out 0.1 of the weights in training\n"
    trainer.model.eval()
    with torch.no_grad():
        wanted = tiny.one_by_one(trainer.model, rows(16)[:8]).item()
    trainer.train()
    assert trainer.packing is None and trainer.counts.computed > trainer.counts.tokens
    assert tiny.losses(trainer)[0] == pytest.approx(wanted, abs=0.05)  # dropout


def test_prompt_methods_are_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny.llama(), config_for("prompt_tuning", task_type="CAUSAL_LM", num_virtual_tokens=5))
    trainer = alone(tmp_path, mappings(rows(16)), model, max_steps=2)
    assert capsys.readouterr().out == "layout: padded batches: adapter 'default' puts virtual tokens before each row\n"
    with torch.no_grad():
        wanted = tiny.one_by_one(trainer.model, rows(16)[:8]).item()
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(wanted, abs=1e-5)


class Weighted(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 2


def test_a_loss_of_ones_own_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pack would pass it by."""
    plain = padded(tmp_path / "a", rows(8), max_steps=1)
    twice = alone(tmp_path / "b", mappings(rows(8)), kind=Weighted, max_steps=1)
    assert capsys.readouterr().out.endswith("layout: padded batches: this Trainer has a compute_loss of its own\n")
    twice.train()
    assert tiny.losses(twice)[0] == pytest.approx(2 * tiny.losses(plain)[0], abs=1e-5)

    def seven(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.sum() * 0 + 7

    for collator in (tiny.collate, Together()):
        func = alone(tmp_path / "c", rows(8), data_collator=collator, compute_loss_func=seven, max_steps=1,
                     gradient_accumulation_steps=1)  # fmt: skip
        func.remove_callback(trimtab.train.audits.StepAudit)
        func.train()
        assert tiny.losses(func) == [7.0]
    assert "its loss is not the one that decoder models are trained with" in capsys.readouterr().out


def test_noise_that_depends_on_the_length_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone(tmp_path, mappings(rows(8)), neftune_noise_alpha=5.0)
    assert "padded batches: NEFTune's noise depends on the length of a row" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_sharded_weights_are_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    trainer = packed(tmp_path, rows(8))
    assert trainer.packing is not None and capsys.readouterr().out == ""
    setattr(trainer, f"is_{kind.lower()}_enabled", True)
    for given in (trainer.packing, None):
        assert layouts.settle(trainer, given, Together(), Trainer) is None
        assert isinstance(trainer.data_collator, Collator)
        assert capsys.readouterr().out.startswith(f"layout: padded batches: {kind} shards the weights")


def test_how_a_run_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in layouts.SHARDED:
        monkeypatch.delenv(name, raising=False)
    assert layouts.launched() == ""
    for name in layouts.SHARDED:
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            assert layouts.launched() == f"padded batches: {layouts.SHARDED[name]}"


def test_rows_that_hold_more_are_left_to_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positions, or labels that are other tokens: as with transformers' Trainer."""
    same = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "position_ids": [3, 4, 5]}] * 8
    other = [{"input_ids": [5, 6, 7], "labels": [9, 9, 9]}] * 8
    for data in (same, other):
        trainer = alone(tmp_path, data, max_steps=1)
        assert trainer.packing is None and capsys.readouterr().out == ""
        assert trainer.get_train_dataloader().collate_fn is not None
        trainer.train()
        assert trainer.counts.computed == trainer.counts.tokens == 24
        capsys.readouterr()


# ---- trimtab train


def options(folder: Path, data: Path, out: Path, **over: Any) -> TrainOptions:
    given: dict[str, Any] = dict(
        model=str(folder), dataset=[str(data)], output_dir=str(out), batch_size=8, max_steps=4, learning_rate=1e-2,
        dtype="float32", val_size=8,
    )  # fmt: skip
    return TrainOptions(**given | over)


def ran(options: TrainOptions) -> tuple[RunResult, list[float], str]:
    """The result, the losses and evaluations in order, and what was said."""
    said = io.StringIO()
    result = run(options, console=Console(file=said, width=200))
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    return result, [line.get("loss", line.get("eval_loss")) for line in lines], said.getvalue()


@pytest.fixture(scope="module")
def whole(model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[float], str]:
    return ran(options(model_folder, rows, tmp_path_factory.mktemp("packed"), eval_steps=2))


def same_run(found: tuple[RunResult, list[float], str], whole: tuple[RunResult, list[float], str]) -> None:
    assert found[1] == pytest.approx(whole[1], abs=1e-5)
    first, second = (load_file(r.output_dir / "adapter_model.safetensors") for r in (found[0], whole[0]))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-4), name
    a, b = found[0].record, whole[0].record
    assert (a.tokens_seen, a.supervised_tokens, a.examples_seen) == (b.tokens_seen, b.supervised_tokens, b.examples_seen)


def test_train_packs(whole: tuple[RunResult, list[float], str]) -> None:
    assert "layout    packs of up to 2,048 tokens; what examples begin with in common is computed once" in whole[2]
    assert len(whole[1]) == 4 + 3 and whole[0].record.tokens_computed < whole[0].record.tokens_seen


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"packing": False}, "layout    padded batches, as asked"),
        ({"packing": False, "micro_batch_size": 2}, "8 a step (2 at a time)"),
        ({"pack_tokens": 100}, "packs of up to 100 tokens"),
        ({"micro_batch_size": 2}, "packs of up to 2,048 tokens"),
        ({"gradient_checkpointing": True}, "packs of up to 2,048 tokens"),
    ],
)
def test_no_layout_changes_a_run(
    whole: Any, model_folder: Path, rows: Path, tmp_path: Path, over: dict[str, Any], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sizes: list[tuple[int, int]] = []
    forward = Engine.forward

    def noted(self: Engine, model: Any, pack: Any) -> Any:
        sizes.append((len(pack.members), len(pack.input_ids)))
        return forward(self, model, pack)

    monkeypatch.setattr(Engine, "forward", noted)
    found = ran(options(model_folder, rows, tmp_path, eval_steps=2, **over))
    assert said in found[2]
    same_run(found, whole)
    computed = found[0].record.tokens_computed
    if over.get("packing") is False:
        assert not sizes and computed > found[0].record.tokens_seen
    elif "pack_tokens" in over:
        assert max(tokens for _, tokens in sizes) <= 100
    elif "micro_batch_size" in over:
        assert {n for n, _ in sizes} == {2} and computed <= found[0].record.tokens_seen
    else:
        assert computed == whole[0].record.tokens_computed


def test_a_run_with_a_model_that_cannot_be_packed(rows: Path, tmp_path: Path) -> None:
    tok = made.tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    result, losses, said = ran(options(tmp_path / "m", rows, tmp_path / "out", val_size=0))
    assert said.count("layout ") == 1
    assert "layout    padded batches: its attention drops out 0.1 of the weights in training" in said
    assert losses[-1] < losses[0] and result.record.tokens_computed > result.record.tokens_seen


def test_a_run_of_a_prompt_method(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    given = {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 4}, "val_size": 0}
    result, losses, said = ran(options(model_folder, rows, tmp_path, **given))
    assert "layout    padded batches: adapter 'default' puts virtual tokens before each row" in said
    assert len(losses) == 4 and result.record.tokens_computed > result.record.tokens_seen


def test_a_run_that_was_launched_with_sharding(
    whole: Any, model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "launched", lambda: "padded batches: FSDP shards the weights")
    found = ran(options(model_folder, rows, tmp_path, eval_steps=2))
    assert "layout    padded batches: FSDP shards the weights" in found[2]
    same_run(found, whole)


def test_a_run_that_is_short_of_memory_says_so_once(
    whole: Any, model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.engine.memory import OverLimit, Watch

    looks: list[int] = []

    def look(self: Watch) -> None:
        looks.append(1)
        if len(looks) == 11:
            raise OverLimit("full")

    monkeypatch.setattr(Watch, "look", look)
    found = ran(options(model_folder, rows, tmp_path, eval_steps=2))
    assert found[2].count("out of memory: 1,024 tokens in one pass from here on; the step is done again, nothing is lost") == 1
    assert found[1] == whole[1], "the packs of this run are the same with half the budget, and so is every bit"


def test_the_door_has_a_trainer() -> None:
    assert importlib.import_module("trimtab").Trainer is Trainer

"""Which layout a Trainer or `trimtab train` chooses, what it says of it, and that the choice changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import model_folder as made
import pytest
import tiny_llama as tiny
import torch
from packed_runs import packed, padded, stemmed
from rich.console import Console
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import trimtab
from trimtab.core.config import config_for
from trimtab.engine.forward import Engine
from trimtab.model import get_peft_model
from trimtab.train import layouts
from trimtab.train.audits import StepAudit
from trimtab.train.batches import Collator, Together
from trimtab.train.options import TrainOptions
from trimtab.train.run import RunResult, run
from trimtab.train.trainer import Trainer

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
    examples: Any = stemmed(16)
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
    assert said == "layout: packs of up to 1,536 tokens; what examples begin with in common is computed once\n"
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
    trainer = alone(tmp_path, mappings(stemmed(16)), gpt2(attn_pdrop=0.1, resid_pdrop=0.0, embd_pdrop=0.0), max_steps=2)
    said = capsys.readouterr().out
    assert said == "layout: padded batches: its attention drops out 0.1 of the weights in training\n"
    trainer.model.eval()
    with torch.no_grad():
        wanted = tiny.one_by_one(trainer.model, stemmed(16)[:8]).item()
    trainer.train()
    assert trainer.packing is None and trainer.counts.computed > trainer.counts.tokens
    assert tiny.losses(trainer)[0] == pytest.approx(wanted, abs=0.05)  # dropout


def test_prompt_methods_are_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny.llama(), config_for("prompt_tuning", task_type="CAUSAL_LM", num_virtual_tokens=5))
    trainer = alone(tmp_path, mappings(stemmed(16)), model, max_steps=2)
    assert capsys.readouterr().out == "layout: padded batches: adapter 'default' puts virtual tokens before each row\n"
    with torch.no_grad():
        wanted = tiny.one_by_one(trainer.model, stemmed(16)[:8]).item()
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(wanted, abs=1e-5)


class Weighted(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 2


def test_a_loss_of_ones_own_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pack would pass it by."""
    plain = padded(tmp_path / "a", stemmed(8), max_steps=1)
    twice = alone(tmp_path / "b", mappings(stemmed(8)), kind=Weighted, max_steps=1)
    assert capsys.readouterr().out.endswith("layout: padded batches: this Trainer has a compute_loss of its own\n")
    twice.train()
    assert tiny.losses(twice)[0] == pytest.approx(2 * tiny.losses(plain)[0], abs=1e-5)

    def seven(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.sum() * 0 + 7

    for collator in (tiny.collate, Together()):
        func = alone(tmp_path / "c", stemmed(8), data_collator=collator, compute_loss_func=seven, max_steps=1,
                     gradient_accumulation_steps=1)  # fmt: skip
        func.remove_callback(StepAudit)
        func.train()
        assert tiny.losses(func) == [7.0]
    assert "its loss is not the one that decoder models are trained with" in capsys.readouterr().out


def test_noise_that_depends_on_the_length_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone(tmp_path, mappings(stemmed(8)), neftune_noise_alpha=5.0)
    assert "padded batches: NEFTune's noise depends on the length of a row" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_sharded_weights_are_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    trainer = packed(tmp_path, stemmed(8))
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
    assert "layout    packs of up to 1,536 tokens; what examples begin with in common is computed once" in whole[2]
    assert len(whole[1]) == 4 + 3 and whole[0].record.tokens_computed < whole[0].record.tokens_seen


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"packing": False}, "layout    padded batches, as asked"),
        ({"packing": False, "micro_batch_size": 2}, "8 a step (2 at a time)"),
        ({"pack_tokens": 100}, "packs of up to 100 tokens"),
        ({"micro_batch_size": 2}, "packs of up to 1,536 tokens"),
        ({"gradient_checkpointing": True}, "packs of up to 1,536 tokens"),
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
    assert found[2].count("out of memory: 768 tokens in one pass from here on; the step is done again, nothing is lost") == 1
    assert found[1] == whole[1], "the packs of this run are the same with half the budget, and so is every bit"

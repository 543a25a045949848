"""Training in packs is training, row by row: the same losses, weights, evaluation, counts and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch
from packed_runs import equal, packed, padded, stemmed, trained
from transformers import TrainerCallback

from trimtab.core.group import Group
from trimtab.errors import BadCheckpoint, DataError, TrainingError
from trimtab.train.batches import Together
from trimtab.train.trainer import Trainer

# ---- the same steps


def test_five_steps_equal_a_plain_loop_and_padded_batches(tmp_path: Path) -> None:
    examples, model = stemmed(40), tiny.adapted()
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
    examples = stemmed(19)  # the last step of an epoch is a short one
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
    found = trained(tmp_path, examples, max_steps=3, tokens=tokens, most=most, share=share, **split)
    assert tiny.losses(found) == pytest.approx(expected(tmp_path), abs=1e-6)
    assert found.counts.examples == 19
    assert found.counts.tokens == sum(len(e.input_ids) for e in examples)
    assert found.counts.supervised == sum(sum(e.supervised[1:]) for e in examples)
    assert share or found.counts.computed == found.counts.tokens - 19  # the last of each row predicts nothing


_expected: list[float] = []


def expected(folder: Path) -> list[float]:
    if not _expected:
        _expected.extend(tiny.losses(padded(folder / "expected", stemmed(19), max_steps=3)))
    return _expected


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    examples = stemmed(16)
    plain = trained(tmp_path / "a", examples, max_steps=2)
    model = tiny.adapted(checkpointing=True)
    assert tiny.losses(trained(tmp_path / "b", examples, model, max_steps=2)) == pytest.approx(tiny.losses(plain), abs=1e-6)


def test_mixed_precision_is_that_of_padded_batches(tmp_path: Path) -> None:
    """A float32 model under bfloat16 autocast."""
    found = trained(tmp_path / "a", stemmed(24), bf16=True)
    other = padded(tmp_path / "b", stemmed(24), bf16=True)
    exact = padded(tmp_path / "c", stemmed(24))
    assert tiny.losses(found) == pytest.approx(tiny.losses(other), abs=5e-3)
    assert tiny.losses(found) != pytest.approx(tiny.losses(exact), abs=1e-6), "autocast was on"


def test_a_penalty_counts_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "penalty", lambda self: sum(a.lora_A.weight.square().sum() for _, a in self.sites()))
    examples, model = stemmed(16), tiny.adapted()
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
    examples, model = stemmed(21), tiny.adapted()
    trainer = packed(tmp_path, None, model, tokens=tokens, evaluated=examples, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    with torch.no_grad():
        counts = [sum(e.supervised[1:]) for e in examples]  # nothing predicts a first token
        wanted = sum(float(tiny.one_by_one(model, [e])) * n for e, n in zip(examples, counts, strict=True)) / sum(counts)
    assert metrics["eval_loss"] == pytest.approx(wanted, abs=1e-6)
    assert metrics["eval_supervised_tokens"] == sum(counts)


def test_logits_are_there_where_they_are_asked_for(tmp_path: Path) -> None:
    """By `predict`, and by an evaluation with metrics of one's own: those batches are padded."""
    examples = stemmed(5)
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
    with pytest.raises(TrainingError, match=r"step 2: the loss .* for rows.jsonl:11, rows.jsonl:14 \(2 of the step's 8"):
        trained(tmp_path, examples, model, per_device_train_batch_size=8, gradient_accumulation_steps=1,
                save_strategy="steps", save_steps=2)  # fmt: skip
    assert not [*tmp_path.iterdir()]
    assert tiny.base(model).config._attn_implementation == "sdpa"


def test_a_step_without_labels_names_its_rows(tmp_path: Path) -> None:
    examples = stemmed(16)
    for e in examples[8:]:
        e.supervised = [True] + [False] * (len(e.input_ids) - 1)  # nothing predicts a first token
    with pytest.raises(TrainingError, match=r"step 2: no supervised token in the rows rows.jsonl:9, "):
        trained(tmp_path, examples)


def test_a_module_that_is_bypassed_is_named(tmp_path: Path) -> None:
    model = tiny.adapted()
    tiny.base(model).model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\..* received no gradient in step 1"):
        trained(tmp_path, stemmed(8), model)


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
        return trained(folder, stemmed(24), tiny.adapted(lora_dropout=0.2), **settings | over)

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
        trained(tmp_path / "part", stemmed(25), tiny.adapted(lora_dropout=0.2), max_steps=6, save_strategy="steps",
                save_steps=2, lr_scheduler_type="cosine", resume=tmp_path / "part" / "checkpoint-4")  # fmt: skip

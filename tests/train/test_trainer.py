"""The numbers that a step, an evaluation and an audit must give, whatever the layout of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch

from trimtab.core.config import config_for
from trimtab.core.group import Group
from trimtab.errors import TrainingError
from trimtab.methods.lora import LoraConfig
from trimtab.model import get_peft_model
from trimtab.train.trainer import Trainer


def trained(folder: Path, examples: list[Any], model: Any = None, *, stop_after: int = 1, **over: Any) -> Trainer:
    model = model if model is not None else tiny.adapted()
    trainer = Trainer(
        model=model,
        args=tiny.arguments(folder, **over),
        train_dataset=examples,
        data_collator=tiny.collate,
        stop_after_nonfinite=stop_after,
    )
    trainer.train()
    return trainer


def test_five_steps_equal_a_plain_loop(tmp_path: Path) -> None:
    examples = tiny.rows(40)
    model = tiny.adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    expected = []
    for step in range(5):
        loss = tiny.one_by_one(model, examples[8 * step : 8 * step + 8])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    trainer = trained(tmp_path, examples)
    assert tiny.losses(trainer) == pytest.approx(expected, abs=2e-6)
    assert expected[0] - expected[-1] > 1e-3
    for mine, theirs in zip(tiny.tensors(trainer.model).values(), parameters, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize(("micro", "accumulate"), [(8, 1), (2, 4), (1, 8)])
def test_the_split_of_a_step_changes_nothing(tmp_path: Path, micro: int, accumulate: int) -> None:
    examples = tiny.rows(19)  # the last step of an epoch is a short one
    expected = trained(tmp_path / "a", examples, max_steps=3)
    split = trained(
        tmp_path / "b", examples, max_steps=3, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate
    )
    assert tiny.losses(split) == pytest.approx(tiny.losses(expected), abs=1e-6)
    assert split.counts.tokens == expected.counts.tokens == sum(len(e.input_ids) for e in examples)
    assert split.counts.supervised == expected.counts.supervised == sum(sum(e.supervised) for e in examples)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    examples = tiny.rows(24)
    expected = trained(tmp_path / "a", examples, max_steps=3)
    model = tiny.adapted(checkpointing=True)
    assert tiny.losses(trained(tmp_path / "b", examples, model, max_steps=3)) == pytest.approx(
        tiny.losses(expected), abs=1e-6
    )


def test_logits_at_chosen_positions_equal_all_logits(tmp_path: Path) -> None:
    from trimtab.train.objectives.sft import row_losses

    batch = tiny.collate(tiny.rows(8))
    batch.pop("rows")
    model = tiny.adapted()
    some, everything = (row_losses(model, dict(batch), sparse=sparse) for sparse in (True, False))
    assert torch.allclose(some, everything, atol=1e-5)
    assert some.sum().item() / 1e3 > 0.01


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_evaluation_does_not_depend_on_its_batch(tmp_path: Path, batch: int) -> None:
    examples, model = tiny.rows(21), tiny.adapted()
    args = tiny.arguments(tmp_path, per_device_eval_batch_size=batch)
    trainer = Trainer(model=model, args=args, eval_dataset=examples, data_collator=tiny.collate)
    metrics = trainer.evaluate()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(tiny.one_by_one(model, examples).item(), abs=1e-6)
    assert metrics["eval_supervised_tokens"] == sum(sum(e.supervised) for e in examples)


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no trainable parameter"):
        trained(tmp_path, tiny.rows(8), tiny.llama())


def test_no_label_is_an_error(tmp_path: Path) -> None:
    examples = tiny.rows(8)
    for e in examples:
        e.supervised = [False] * len(e.input_ids)
    with pytest.raises(TrainingError, match="none of 8 examples has a supervised token"):
        trained(tmp_path, examples)


def test_a_step_without_labels_names_its_rows(tmp_path: Path) -> None:
    examples = tiny.rows(16)
    for e in examples[8:]:
        e.supervised = [False] * len(e.input_ids)
    with pytest.raises(TrainingError, match=r"step 2: no supervised token in the rows rows.jsonl:9, "):
        trained(tmp_path, examples)


def test_a_loss_that_is_not_finite_names_its_rows_and_saves_nothing(tmp_path: Path) -> None:
    examples, model = tiny.rows(16), tiny.adapted()
    examples[10].input_ids[0] = 60
    for e in examples:
        e.input_ids[1:] = [min(t, 59) for t in e.input_ids[1:]]
        e.input_ids[0] = 60 if e is examples[10] else 5
    tiny.embedding(model).weight.data[60] = float("nan")
    with pytest.raises(TrainingError, match=r"step 2: the loss is not finite for rows.jsonl:11 \(1 of the step's 8 rows\)"):
        trained(tmp_path, examples, model, save_strategy="steps", save_steps=2)
    assert not [*tmp_path.iterdir()]


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    model = tiny.adapted()
    name, tensor = next(iter(tiny.tensors(model).items()))
    tensor.register_hook(lambda grad: grad * float("inf"))
    before = tensor.detach().clone()
    with pytest.raises(TrainingError, match="gradient's norm is"):
        trained(tmp_path, tiny.rows(8), model)
    assert torch.equal(tensor, before), name


def test_the_audit_names_a_module_that_is_bypassed(tmp_path: Path) -> None:
    model = tiny.adapted()
    layer = tiny.base(model).model.layers[1]
    layer.mlp.forward = lambda x: x
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\..* received no gradient in step 1"):
        trained(tmp_path, tiny.rows(8), model)


def test_the_audit_names_tensors_that_the_optimizer_leaves_alone(tmp_path: Path) -> None:
    model = tiny.adapted()
    held = [p for name, p in tiny.tensors(model).items() if "layers.0" in name]
    optimizer = torch.optim.AdamW(held, lr=1e-2)
    args = tiny.arguments(tmp_path)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tiny.rows(8),
        data_collator=tiny.collate,
        optimizers=(optimizer, None),
    )
    with pytest.raises(TrainingError, match=r"layers\.1\..* had not changed \(float32\)"):
        trainer.train()


def test_the_audit_waits_for_a_learning_rate(tmp_path: Path) -> None:
    trainer = trained(tmp_path, tiny.rows(40), lr_scheduler_type="linear", warmup_steps=3)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == 0 and rates[3] == pytest.approx(1e-2)


@pytest.mark.parametrize(("micro", "accumulate"), [(8, 1), (2, 4)])
def test_a_penalty_counts_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int, accumulate: int
) -> None:
    told: list[int] = []
    monkeypatch.setattr(Group, "penalty", lambda self: sum(a.lora_A.weight.square().sum() for _, a in self.sites()))
    monkeypatch.setattr(Group, "step", lambda self, step: told.append(step))
    examples, model = tiny.rows(24), tiny.adapted()
    with torch.no_grad():
        squares = sum(p.square().sum().item() for name, p in tiny.tensors(model).items() if "lora_A" in name)
        expected = tiny.one_by_one(model, examples[:8]).item() + squares
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
    trainer = trained(tmp_path, examples, model, max_steps=3, **split)
    assert tiny.losses(trainer)[0] == pytest.approx(expected, abs=1e-5)
    assert told == [1, 2, 3]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"r": 4, "target_modules": "all-linear", "use_dora": True}),
        ("ia3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("oft", {"target_modules": ["q_proj"], "oft_block_size": 8}),
        ("vera", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
        ("prompt_tuning", {"num_virtual_tokens": 5}),
        ("prefix_tuning", {"num_virtual_tokens": 5}),
    ],
)
def test_every_method_passes_the_audits_and_learns(tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    examples, model = tiny.rows(8), get_peft_model(tiny.llama(), config_for(method, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        expected = tiny.one_by_one(model, examples).item()
    trainer = trained(tmp_path, examples, model, max_steps=8, learning_rate=2e-2)
    found = tiny.losses(trainer)
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0]


def test_what_predicts_the_next_token() -> None:
    """Named by transformers, or tried: GPT-2 has no name for its loss."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPT2Model,
        LlamaForSequenceClassification,
        XLNetConfig,
        XLNetLMHeadModel,
    )

    from trimtab.train.objectives.sft import predicts_next

    small = dict(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    gpt2 = GPT2LMHeadModel(GPT2Config(**small)).train()
    assert predicts_next(gpt2) and gpt2.training
    assert predicts_next(tiny.llama())
    other = XLNetLMHeadModel(XLNetConfig(vocab_size=61, d_model=32, n_layer=1, n_head=4, d_inner=32))  # labels not shifted
    for model in (GPT2Model(GPT2Config(**small)), LlamaForSequenceClassification(tiny.llama().config), other):
        assert not predicts_next(model)
    assert not predicts_next(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("routers", [False, True])
def test_a_loss_of_routers_is_trained_on_where_the_config_asks_for_it(
    tmp_path: Path, routers: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the model's own forward adds it: balanced experts are asked for in the config, and packs know nothing of it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    torch.manual_seed(0)
    config = MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, output_router_logits=routers,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    model = get_peft_model(MixtralForCausalLM(config), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids)
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    arguments = tiny.arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=1)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert ("its loss is not the one that decoder models are trained with" in capsys.readouterr().out) == routers
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(float(wanted.loss), abs=1e-5)
    assert not routers or float(wanted.loss) - float(wanted.aux_loss) / 2 < float(wanted.loss) - 0.1


@pytest.mark.parametrize("wrapped", [True, False])
def test_mixed_precision(tmp_path: Path, wrapped: bool) -> None:
    """accelerate replaces the forward of the model that it prepares, a PeftModel's too, and gives it back at the end."""
    examples, model = tiny.rows(24), tiny.adapted()
    found = trained(tmp_path / "a", examples, model if wrapped else tiny.base(model), max_steps=3, bf16=True)
    exact = trained(tmp_path / "b", examples, max_steps=3)
    assert tiny.losses(found) == pytest.approx(tiny.losses(exact), abs=1e-2)
    assert tiny.losses(found) != pytest.approx(tiny.losses(exact), abs=1e-6), "autocast was on"
    plain = found.accelerator.unwrap_model(found.model_wrapped, keep_fp32_wrapper=False)
    with torch.no_grad():
        assert plain(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32
        both = [m(input_ids=torch.tensor([[5, 6, 7]])).logits for m in (plain, tiny.base(model))]
    assert torch.equal(*both)

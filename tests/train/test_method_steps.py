"""Methods with low-rank and structured updates in our Trainer: they learn, and those with a budget keep it by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch
from packed_runs import stemmed, trained
from test_checkpoints import Stop
from transformers import BertConfig, BertForSequenceClassification

from trimtab.core.config import config_for
from trimtab.core.group import group
from trimtab.errors import TrainingError
from trimtab.inject import get_peft_model_state_dict
from trimtab.model import PeftModel, get_peft_model
from trimtab.train.trainer import Trainer

LEARNERS: dict[str, tuple[float, dict[str, Any]]] = {
    "bdlora": (2e-2, {"use_bdlora": {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["q_", "v_"], "nblocks": 2}}),
    "kasa": (2e-2, {"kasa_config": {"beta": 0.0, "gamma": 0.0}}),
    "monteclora": (2e-2, {"monteclora_config": {"kl_loss_weight": 0.0}}),
    "qalora": (2e-2, {"qalora_group_size": 4}),
    "velora": (2e-2, {"velora_config": {"num_groups": 4}}),
    "adalora": (2e-2, {"total_step": 8, "init_r": 6, "target_r": 4, "orth_reg_weight": 0.0}),
    "adamss": (2e-2, {"r": 8, "subspace_rank": 2}),
    "deft": (5e-3, {"r": 4}),
    "delora": (2e-2, {"r": 4}),
    "frod": (2e-2, {"sparse_rate": 0.1}),
    "glora": (2e-2, {"r": 4}),
    "gralora": (2e-2, {"r": 4, "alpha": 8}),
    "hira": (5e-2, {"r": 8}),
    "lily": (2e-2, {"r": 4}),
    "loha": (5e-2, {"r": 4}),
    "lokr": (2e-2, {"r": 2}),
    "peanut": (2e-2, {"r": 8}),
    "pvera": (5e-2, {"r": 16}),
    "randlora": (2e-2, {"r": 8, "randlora_alpha": 40}),
    "tinylora": (5e-2, {"r": 4, "u": 32}),
    "unilora": (2e-2, {"theta_d_length": 200}),
    "vblora": (2e-2, {"vector_length": 8, "num_vectors": 30}),
}


def adapted(method: str, **options: Any) -> Any:
    torch.manual_seed(3)
    names = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(tiny.llama(), config_for(method, task_type="CAUSAL_LM", target_modules=names, **options))


def run(folder: Path, model: Any, *, resume: Path | None = None, stop: int | None = None, **over: Any) -> Trainer:
    trainer = Trainer(
        model=model,
        args=tiny.arguments(folder, **over),
        train_dataset=tiny.rows(8 if "learning_rate" in over else 24),
        data_collator=tiny.collate,
        callbacks=[Stop(stop)] if stop else [],
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.mark.parametrize("method", LEARNERS)
def test_a_method_passes_the_audits_and_learns(tmp_path: Path, method: str) -> None:
    rate, options = LEARNERS[method]
    model = adapted(method, **options)
    with torch.no_grad():
        expected = tiny.one_by_one(model.eval(), tiny.rows(8)).item()
    found = tiny.losses(run(tmp_path, model.train(), max_steps=8, learning_rate=rate))
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.005


SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 8, "tfinal": 2, "tinit": 1, "init_r": 4, "target_r": 2, "lora_dropout": 0.2},
    "adamss": dict(
        r=8, num_subspaces=3, use_asa=True, init_warmup=1, final_warmup=7, mask_interval=2, asa_target_subspaces=6
    ),
}


def kept(model: Any, method: str) -> list[list[bool]]:
    name = {"adalora": "kept", "adamss": "on"}[method]
    return [getattr(a, name).tolist() for _, a in group(model.get_base_model(), "default").sites()]


@pytest.mark.parametrize("method", SETTINGS)
def test_a_budget_advances_by_itself_and_in_a_plain_loop_with_one_line(tmp_path: Path, method: str) -> None:
    options = {k: v for k, v in SETTINGS[method].items() if "dropout" not in k}
    trainer = run(tmp_path, adapted(method, **options), max_steps=8)
    model, examples = adapted(method, **options), tiny.rows(24)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(8):
        loss = tiny.one_by_one(model, examples[8 * (step % 3) : 8 * (step % 3) + 8])
        if (penalty := group(model.get_base_model(), "default").penalty()) is not None:
            loss = loss + penalty
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    assert tiny.losses(trainer) == pytest.approx(losses, abs=1e-4)
    left = kept(trainer.model, method)
    assert left == kept(model, method)
    total = sum(map(sum, left))
    assert total == {"adalora": 2 * 6, "adamss": 6 + int(12 * (1 / 6) ** 3)}[method] and total < sum(map(len, left))
    trainer.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    ids = torch.tensor([examples[0].input_ids])
    assert torch.allclose(again(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_budget_is_resumed_bit_for_bit(tmp_path: Path, method: str) -> None:
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = run(tmp_path / "whole", adapted(method, **SETTINGS[method]), **saving)
    run(tmp_path / "part", adapted(method, **SETTINGS[method]), stop=3, **saving)
    torch.manual_seed(99)
    again = adapted(method, **SETTINGS[method])
    resumed = run(tmp_path / "part", again, resume=tmp_path / "part" / "checkpoint-3", **saving)
    assert tiny.losses(resumed) == tiny.losses(whole)
    assert kept(resumed.model, method) == kept(whole.model, method)
    for name, tensor in tiny.tensors(whole.model).items():
        assert torch.equal(tensor, tiny.tensors(resumed.model)[name]), name


SEEN: dict[str, dict[str, Any]] = {  # what a run draws, and what it has seen, is part of its state
    "monteclora": {"monteclora_config": {"sample_scaler": 0.1, "kl_loss_weight": 0.01}, "lora_dropout": 0.2},
    "velora": {"velora_config": {"num_groups": 4, "init_type": "batch_average_once"}},
}


@pytest.mark.parametrize("method", SEEN)
def test_noise_and_estimates_are_resumed_bit_for_bit(tmp_path: Path, method: str) -> None:
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "whole", adapted(method, **SEEN[method]), **saving)
    run(tmp_path / "part", adapted(method, **SEEN[method]), stop=3, **saving)
    torch.manual_seed(99)
    again = adapted(method, **SEEN[method])
    resumed = run(tmp_path / "part", again, resume=tmp_path / "part" / "checkpoint-3", **saving)
    assert tiny.losses(resumed) == tiny.losses(whole)
    for key, tensor in get_peft_model_state_dict(whole.model).items():
        assert torch.equal(tensor, get_peft_model_state_dict(resumed.model)[key]), key


def test_penalties_of_variants_are_in_the_loss_by_themselves(tmp_path: Path) -> None:
    model = adapted("kasa", kasa_config={"beta": 0.01, "gamma": 0.1})
    penalty = group(model.get_base_model(), "default").penalty()
    with torch.no_grad():
        expected = tiny.one_by_one(model.eval(), tiny.rows(8)) + penalty
    assert penalty > 1
    found = tiny.losses(run(tmp_path / "kasa", model.train(), max_steps=2, learning_rate=1e-2))
    assert found[0] == pytest.approx(expected.item(), abs=1e-4)
    model = adapted("monteclora", monteclora_config={"kl_loss_weight": 1.0})
    size = lambda: sum(p.square().sum().item() for n, p in model.named_parameters() if n.endswith("std_prior"))  # noqa: E731
    before = size()
    run(tmp_path / "monteclora", model, max_steps=6, learning_rate=5e-2)
    assert size() < 0.7 * before  # towards the prior, exp(0) = 1


def test_a_budget_that_is_told_too_late_says_so() -> None:
    model = adapted("adalora", **SETTINGS["adalora"])
    ids = torch.tensor([tiny.rows(1)[0].input_ids])
    model(ids, labels=ids).loss.backward()
    model.zero_grad()
    with pytest.raises(TrainingError, match="zero_grad"):
        model.update_and_allocate(1)


def test_frozen_adapters_are_not_told_and_add_no_penalty() -> None:
    model = adapted("adalora", **SETTINGS["adalora"])
    ids = torch.tensor([tiny.rows(1)[0].input_ids])
    with torch.no_grad():
        plain = model.eval()(ids, labels=ids).loss.item()
    model.train().set_requires_grad("default", False)
    assert model(ids, labels=ids).loss.item() == pytest.approx(plain)
    model.update_and_allocate(1)
    assert all(all(row) for row in kept(model, "adalora"))


def test_a_penalty_is_in_the_loss_of_an_encoder_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids, labels = torch.randint(3, 37, (8, 6)), torch.randint(0, 3, (8,))
    options: dict[str, Any] = {"total_step": 4, "init_r": 4, "target_r": 2, "target_modules": ["query"]}
    model = get_peft_model(BertForSequenceClassification(config), config_for("adalora", task_type="SEQ_CLS", **options))
    with torch.no_grad():
        penalty = group(model.get_base_model(), "default").penalty()
        assert penalty is not None and penalty > 0.1
        expected = model.eval()(input_ids=ids, labels=labels).loss + penalty
    arguments = tiny.arguments(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=1)
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    trainer = Trainer(model=model.train(), args=arguments, train_dataset=rows)
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(expected.item(), abs=1e-5)


def test_a_method_s_own_loss_is_what_is_trained(tmp_path: Path) -> None:
    """CPT counts the labels of its context too."""
    torch.manual_seed(3)
    context = {"cpt_token_ids": [4, 9, 3, 8], "cpt_tokens_type_mask": [1, 2, 3, 4], "opt_projection_epsilon": 9.0}
    model = get_peft_model(tiny.llama(), config_for("cpt", task_type="CAUSAL_LM", **context)).eval()
    with torch.no_grad():
        batch = tiny.collate(tiny.rows(8)[:2])
        alone, expected = tiny.llama()(**batch).loss, model(**batch).loss
    over = dict(max_steps=6, learning_rate=5e-2, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    arguments = tiny.arguments(tmp_path, **over)
    rows = tiny.rows(8)[:2]
    trainer = Trainer(model=model.train(), args=arguments, train_dataset=rows, data_collator=tiny.collate)
    trainer.train()
    found = tiny.losses(trainer)
    assert found[0] == pytest.approx(expected.item(), abs=1e-5) and abs(expected - alone) > 1e-2
    assert found[-1] < found[0] - 0.005


AROUND: dict[str, tuple[float, dict[str, Any]]] = {
    "adaption_prompt": (5e-2, {"adapter_len": 4, "adapter_layers": 2}),
    "bottleneck": (2e-2, {"reduction_factor": 4}),
    "compacter": (5e-2, {"reduction_factor": 4, "phm_init_range": 0.1}),
    "loreft": (5e-2, {"r": 4, "dropout": 0.0, "prefix_positions": 8}),
    "p_tuning": (2e-2, {"num_virtual_tokens": 4}),
    "multitask_prompt_tuning": (2e-1, {"num_virtual_tokens": 4}),
    "cartridge": (5e-2, {"num_virtual_tokens": 4}),
}


@pytest.mark.parametrize("method", AROUND)
def test_a_method_around_blocks_or_the_model_learns_from_the_loss_of_each_row(tmp_path: Path, method: str) -> None:
    rate, options = AROUND[method]
    torch.manual_seed(3)
    model = get_peft_model(tiny.llama(), config_for(method, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        expected = tiny.one_by_one(model.eval(), tiny.rows(8)).item()
    found = tiny.losses(run(tmp_path, model.train(), max_steps=8, learning_rate=rate))
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.005


@pytest.mark.parametrize("method", ["adaption_prompt", "bottleneck", "compacter", "loreft"])
def test_packs_with_shared_beginnings_have_the_loss_of_each_row(tmp_path: Path, method: str) -> None:
    rate, options = AROUND[method]
    model = get_peft_model(tiny.llama(), config_for(method, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape) if p.requires_grad else 0.0)
        expected = tiny.one_by_one(model.eval(), stemmed(8)).item()
        with model.disable_adapter():
            assert abs(tiny.one_by_one(model, stemmed(8)).item() - expected) > 1e-3
    found = tiny.losses(trained(tmp_path, stemmed(8), model.train(), max_steps=4, learning_rate=rate))
    assert found[0] == pytest.approx(expected, abs=1e-4) and found[-1] < found[0]

"""What a run audits as it goes: which modules act, which tensors change, and that both are said by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import tiny_llama as tiny
import torch
import torch.nn.functional as F
from packed_runs import packed, stemmed
from test_trainer import trained
from torch import Tensor, nn
from transformers import TrainingArguments

from trimtab.core.config import config_for
from trimtab.errors import TrainingError, TrimtabWarning
from trimtab.model import get_peft_model
from trimtab.train.trainer import Trainer


def read_directly(self: Any, x: Tensor) -> Tensor:
    """As fused kernels do: the gate's weight is read, its forward is not called."""
    return self.down_proj(self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x))


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora and bias": {"r": 4, "use_dora": True},
    "adalora": {"total_step": 8, "init_r": 4, "target_r": 2},  # whose penalty gives A and B a gradient all the same
    "ia3": {"feedforward_modules": []},
    "oft": {"oft_block_size": 8},
    "vera": {"r": 8},
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_module_whose_weight_is_read_directly_is_named(tmp_path: Path, method: str, layout: str) -> None:
    config = config_for(method.split()[0], task_type="CAUSAL_LM", target_modules=["q_proj", "gate_proj"], **METHODS[method])
    model = get_peft_model(tiny.llama(), config)
    mlp = tiny.base(model).model.layers[1].mlp
    mlp.forward = MethodType(read_directly, mlp)
    said = r"layers\.1\.mlp\.gate_proj\..* received no gradient in step 1.*weight read directly"
    with pytest.raises(TrainingError, match=said):
        if layout == "padded":
            trained(tmp_path, tiny.rows(8), model)
        else:
            packed(tmp_path, stemmed(8), model).train()
    assert not [*tmp_path.iterdir()]


def shut(model: Any) -> Any:
    """A model in which nothing that the second layer's gate does can be seen: what it is multiplied with is zero."""
    mlp = tiny.base(model).model.layers[1].mlp
    nn.init.zeros_(mlp.up_proj.weight)
    return model


def test_tensors_that_a_run_never_changes_are_named_at_its_end(tmp_path: Path) -> None:
    model = shut(tiny.adapted(target_modules=["q_proj", "gate_proj"]))
    said = r"2 of the trainable tensors \(.*gate_proj.*lora_A.*gate_proj.*lora_B.*\) did not change in 12 steps"
    with pytest.warns(TrimtabWarning, match=said):
        trained(tmp_path / "a", tiny.rows(24), model, max_steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every one of these changes by the second step
        trained(tmp_path / "b", tiny.rows(24), tiny.adapted(target_modules=["q_proj", "gate_proj"]), max_steps=12)


def test_a_tensor_that_has_no_gradient_at_first_must_change_with_its_first_one(tmp_path: Path) -> None:
    """LoRA's A has one in step 2 only, since B is zero: an optimizer that lost it is found there."""
    model = tiny.adapted()
    held = [p for name, p in tiny.tensors(model).items() if "lora_B" in name]
    trainer = Trainer(
        model=model, args=tiny.arguments(tmp_path), train_dataset=tiny.rows(24), data_collator=tiny.collate,
        optimizers=(torch.optim.SGD(held, lr=1e-1), None),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"1[0-4] of the trainable tensors .*lora_A.* had not changed"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("order", [1, -1])
def test_an_evaluation_is_the_same_in_every_batch_and_order(tmp_path: Path, batch: int, order: int) -> None:
    """To the last digit that a sum in another order leaves, with a row that supervises nothing among them."""
    rows = tiny.rows(9)
    rows[4].supervised = [False] * len(rows[4].input_ids)
    model = tiny.adapted()
    alone = packed(tmp_path, None, model, evaluated=rows, per_device_eval_batch_size=9).evaluate()
    found = packed(tmp_path, None, model, evaluated=rows[::order], per_device_eval_batch_size=batch, tokens=64).evaluate()
    assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert found["eval_supervised_tokens"] == alone["eval_supervised_tokens"] == sum(sum(e.supervised) for e in rows)


@pytest.mark.parametrize(("verb", "said"), [("merge_adapter", "unmerge_adapter"), ("disable_adapter_layers", "enable_adapter")])
def test_adapters_that_no_gradient_reaches_are_not_trained(tmp_path: Path, verb: str, said: str) -> None:
    model = get_peft_model(tiny.llama(), config_for("lora", target_modules=["q_proj"], task_type="CAUSAL_LM"))
    getattr(model, verb)()
    with pytest.raises(TrainingError, match=said):
        trained(tmp_path, tiny.rows(4), model)


def test_rows_without_labels_are_said(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), config_for("lora", target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.ones(6, dtype=torch.long)
    rows: Any = [{"input_ids": ids, "attention_mask": ids} for _ in range(4)]
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = Trainer(model, args, train_dataset=rows)
    for work in (trainer.train, lambda: trainer.evaluate(rows)):
        with pytest.raises(TrainingError, match=r"input_ids, attention_mask and no labels.*DataCollatorForLanguageModeling"):
            work()


def test_a_float16_scaler_may_meet_infinities_while_it_looks_for_its_scale() -> None:
    from transformers import TrainerControl, TrainerState

    from trimtab.train.audits import StepAudit

    model = tiny.adapted()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, torch.inf)

    class Scaled(torch.optim.SGD):
        scaler: Any = None

    optimizer = Scaled([p for p in model.parameters() if p.requires_grad], lr=0.1)
    given: Any = (object(), TrainerState(), TrainerControl())

    def step() -> None:
        StepAudit(lambda: False).on_pre_optimizer_step(*given, model=model, optimizer=optimizer)

    with pytest.raises(TrainingError, match="not finite in step 1"):
        step()
    optimizer.scaler = torch.amp.GradScaler("cpu")
    step()

"""Poly: each row by its task, in batches, in generation and where layers are computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_llama import endless as llama
from torch import Tensor, nn

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import ConfigError, NotMergeable, NotSupported, TrainingError
from trimtab.model import checkpoint_activations

IDS = torch.randint(3, 37, (4, 5), generator=torch.Generator().manual_seed(4))
TASKS = torch.tensor([1, 0, 2, 1])


def poly(**more: Any) -> PeftModel:
    fields: dict[str, Any] = dict(target_modules=["q_proj", "down_proj"], r=2, n_tasks=3, n_skills=3, init_weights=False)
    model = get_peft_model(llama(), config_for("poly", **fields | more))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "module_logits" in n:
                p.normal_(std=2, generator=torch.Generator().manual_seed(len(n)))
    return model.eval()


@pytest.mark.parametrize("splits", [1, 2])
def test_the_equation(splits: int) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)).double(),
        config_for("poly", target_modules=["0"], r=2, n_tasks=3, n_skills=4, n_splits=splits, init_weights=False),
    ).eval()
    a: Any = model.get_base_model()[0].adapters["default"]
    a.poly_router.module_logits.data.normal_()
    x, w, b = torch.randn(3, 5, 8).double(), model.get_base_model()[0].weight, model.get_base_model()[0].bias
    got = model(x, task_ids=[2, 0, 2])
    for row, task in enumerate([2, 0, 2]):
        z = a.poly_router.module_logits[task].view(splits, 4).sigmoid()
        p = z / z.sum(1, keepdim=True)
        A = torch.cat([sum(p[q, e] * a.poly_lora_A[q, e] for e in range(4)) for q in range(splits)])  # (in, r)
        B = torch.cat([sum(p[q, e] * a.poly_lora_B[q, e] for e in range(4)) for q in range(splits)], 1)  # (r, out)
        assert (got[row] - (x[row] @ w.T + b + x[row] @ A @ B / 2)).abs().max() < 1e-12


def test_rows_of_tasks_are_batches_of_a_task() -> None:
    model = poly()
    got = model(IDS, task_ids=TASKS).logits
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    text = model.generate(input_ids=IDS, task_ids=TASKS, **options)
    for i in range(4):
        assert (model(IDS[i : i + 1], task_ids=TASKS[i : i + 1]).logits[0] - got[i]).abs().max() < 1e-5
        assert torch.equal(model.generate(input_ids=IDS[i : i + 1], task_ids=[int(TASKS[i])], **options)[0], text[i])
    assert (model(IDS, task_ids=TASKS.flip(0)).logits - got).abs().max() > 1e-3


def test_a_mixed_batch_of_two_with_other_tasks_and_the_base() -> None:
    model = poly()
    model.add_adapter("two", config_for("poly", target_modules=["v_proj"], r=2, n_tasks=9, init_weights=False))
    names, tasks = ["two", "default", "__base__", "two"], torch.tensor([8, 2, 0, 5])
    with pytest.raises(ConfigError, match=r"task_ids \[8, 2, 0, 5\]"):
        model(IDS, task_ids=tasks, adapter_names=["default"] * 4)
    tasks = torch.tensor([2, 2, 0, 1])
    got = model(IDS, task_ids=tasks, adapter_names=names).logits
    for i, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
            assert (model(IDS[i : i + 1], task_ids=tasks[i : i + 1]).logits[0] - got[i]).abs().max() < 1e-5


def gradients(model: PeftModel, again: bool) -> dict[str, Tensor]:
    if again:
        checkpoint_activations(model.get_base_model())
    torch.manual_seed(5)
    model.train()(IDS, task_ids=TASKS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_the_same_when_layers_are_computed_again() -> None:
    want, got = gradients(poly(), False), gradients(poly(), True)
    assert len(want) == 12 and all(g.abs().max() > 0 for g in want.values())
    assert all((got[n] - g).abs().max() < 1e-6 for n, g in want.items())
    model = poly().train()
    checkpoint_activations(model.get_base_model())
    losses = [model(IDS, task_ids=t, labels=IDS).loss for t in (TASKS, TASKS.flip(0))]
    with pytest.raises(TrainingError, match="before the next forward"):
        sum(losses).backward()


def test_what_cannot_be_right_is_refused() -> None:
    model = poly()
    wrong = [([0, 1, 2, 3], "from 0 to 2"), ([0, -1, 1, 1], "from 0 to 2"), ([0, 1], "4 rows"), ([0], "4 rows")]
    for ids, found in [(None, "3 tasks"), *wrong]:
        with pytest.raises(ConfigError, match=found):
            model(IDS, task_ids=ids)
    with pytest.raises(ConfigError, match="task_ids has 2 values for a batch of 4 rows"):
        model.generate(IDS, task_ids=[0, 1], max_new_tokens=2)
    with pytest.raises(NotMergeable, match="task of each row"):
        model.merge_adapter()
    with pytest.raises(NotSupported, match="5 splits"):
        poly(n_splits=5)
    with pytest.raises(ConfigError, match="poly_type"):
        poly(poly_type="mhr")
    one = poly(n_tasks=1)
    assert (one(IDS).logits - one(IDS, task_ids=[0] * 4).logits).abs().max() < 1e-6

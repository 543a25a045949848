"""No. 60: the best checkpoint comes back at the end, for prompts too and for any name of the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch

from trimtab import get_peft_model
from trimtab.core.config import config_for
from trimtab.train import checkpoint
from trimtab.train.trainer import Trainer

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("lora", "mine", {"r": 2, "target_modules": ["q_proj"]}),
    ("prompt_tuning", "default", {"num_virtual_tokens": 3}),
    ("prefix_tuning", "mine", {"num_virtual_tokens": 3}),
    ("p_tuning", "mine", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
]


@pytest.mark.parametrize(("method", "name", "fields"), CASES, ids=[f"{m}-{n}" for m, n, _ in CASES])
def test_the_model_ends_as_it_was_when_best(method: str, name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), config_for(method, task_type="CAUSAL_LM", **fields), name)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Spoiled(Trainer):
        """Evaluations of which the second was the best."""

        def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
            step = self.state.global_step
            kept[step] = {k: v.clone() for k, v in checkpoint.kept(self.model).items()}
            return {"eval_loss": abs(step - 2.0)}

    settings = dict(max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                    load_best_model_at_end=True, learning_rate=0.1, gradient_accumulation_steps=1)  # fmt: skip
    trainer = Spoiled(
        model=model, args=tiny.arguments(tmp_path, **settings), train_dataset=tiny.rows(12),
        eval_dataset=tiny.rows(4, seed=1), data_collator=tiny.collate,
    )  # fmt: skip
    trainer.train()
    end = checkpoint.kept(trainer.model)
    assert trainer.state.best_global_step == 2
    assert all(torch.equal(v, kept[2][k]) for k, v in end.items())
    assert any(not torch.equal(kept[3][k], v) for k, v in end.items())

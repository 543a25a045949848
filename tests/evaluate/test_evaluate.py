"""Loss and answers do not depend on how rows are put into batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # the tiny model is made there

import model_folder as made
import tiny_llama as tiny

from trimtab import get_peft_model
from trimtab.core.config import config_for
from trimtab.data import Renderer
from trimtab.errors import DataError
from trimtab.evaluate import exact_match, generate_answers, loss


def one_by_one(model: Any, examples: list[Any]) -> float:
    """The definition."""
    total, count = 0.0, 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, -len(example.input_ids) :]
        for t in range(1, len(example.input_ids)):
            if example.supervised[t]:
                total += F.cross_entropy(logits[t - 1], torch.tensor(example.input_ids[t])).item()
                count += 1
    return total / count


@pytest.mark.parametrize("method", [None, "lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("tokens", [1, 64, 10_000])
def test_loss_is_the_mean_over_tokens_whatever_the_batches(method: str | None, tokens: int) -> None:
    model: Any = tiny.llama().eval()
    if method:
        model = get_peft_model(model, config_for(method, task_type="CAUSAL_LM", **small(method))).eval()
    examples = tiny.rows(12)
    with torch.no_grad():
        expected = one_by_one(model, examples)
    assert loss(model, examples, pad_token_id=tiny.PAD, tokens=tokens) == pytest.approx(expected, rel=1e-5)


def small(method: str) -> dict[str, Any]:
    return {"init_lora_weights": False} if method == "lora" else {"num_virtual_tokens": 3}


def test_no_label_is_no_loss() -> None:
    with pytest.raises(DataError, match="supervised"):
        loss(tiny.llama(), [tiny.Example([1, 2, 3], [False] * 3)], pad_token_id=tiny.PAD)


def test_answers_are_those_of_each_prompt_alone() -> None:
    renderer = Renderer(made.tokenizer())
    model = tiny.llama(vocabulary=len(renderer.tokenizer)).eval()
    prompts = [[{"role": "user", "content": "x" * n}] for n in (9, 1, 5)]
    alone = [generate_answers(model, renderer, [p], 5)[0] for p in prompts]
    assert generate_answers(model, renderer, prompts, 5) == alone
    assert generate_answers(model, renderer, prompts, 5, batch_size=2) == alone


def test_exact_match() -> None:
    assert exact_match([" a", "b", "C"], ["a", "b ", "c"]) == pytest.approx(2 / 3)

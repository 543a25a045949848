"""Greedy answers in left-padded batches, and how many are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.data import Renderer

Messages = list[dict[str, Any]]


@torch.no_grad()
def generate_answers(
    model: Any, renderer: Renderer, prompts: Sequence[Messages], max_new_tokens: int = 64, *, batch_size: int = 16
) -> list[str]:
    """The answer to each conversation, up to the token that ends a turn, in the order of `prompts`."""
    training = model.training
    model.eval()
    ids = [renderer.prompt_ids(messages) for messages in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, text in zip(chosen, _answer(model, renderer, [ids[i] for i in chosen], max_new_tokens), strict=True):
            answers[i] = text
    model.train(training)
    return answers


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that equal the expected text, but for blanks at the ends."""
    right = [a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)]
    return sum(right) / len(right)


def _answer(model: Any, renderer: Renderer, ids: list[list[int]], max_new_tokens: int) -> list[str]:
    pad, device = renderer.tokenizer.pad_token_id, next(model.parameters()).device
    longest = max(map(len, ids))
    # on the left, so that every answer begins right after its prompt
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    out = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=renderer.stop_token_ids,
    )
    return [renderer.tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in out]

"""Loss = - sum over supervised tokens of log p(token | all before it) / number of supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trimtab.data import Example, collate
from trimtab.engine.rope import changes_at
from trimtab.errors import DataError


@torch.no_grad()
def loss(model: Any, examples: Sequence[Example], *, pad_token_id: int, tokens: int = 2048) -> float:
    """The mean over tokens, so that it does not depend on the batches; `tokens`: padded size of one, at most."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for batch in batches(examples, tokens, changes_at(getattr(model, "config", None))):
        inputs = {k: v.to(device) for k, v in collate(batch, pad_token_id).items()}
        labels = inputs.pop("labels")  # (B, T)
        # the last T: prompt methods put virtual tokens in front
        logits = model(**inputs).logits[:, -labels.shape[1] :]  # (B, T, V)
        wanted = labels[:, 1:] != -100
        picked = logits[:, :-1][wanted].float()
        total += F.cross_entropy(picked, labels[:, 1:][wanted], reduction="sum").item()
        count += int(wanted.sum())
    model.train(training)
    if not count:
        raise DataError(f"none of the {len(examples)} examples has a supervised token, so there is no loss")
    return total / count


def batches(examples: Sequence[Example], tokens: int, alone: int | None) -> Iterator[list[Example]]:
    """Neighbours in length together, so that little is padded; at least one example each, and no more `alone` tokens on."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda e: len(e.input_ids)):
        n = len(example.input_ids)
        if batch and ((len(batch) + 1) * n > tokens or (alone is not None and n > alone)):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch

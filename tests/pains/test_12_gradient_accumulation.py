"""However a step is split, its loss is the sum over its supervised tokens by their number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from situations import tiny, trainer


def test_every_split_is_the_step(tmp_path: Path) -> None:
    rows = tiny.rows(8)
    lengths = [sum(r.supervised[1:]) for r in rows]
    assert max(lengths) > 3 * min(lengths)  # a mean of means would be another number
    model = tiny.adapted()
    want = tiny.one_by_one(model, rows)
    want.backward()
    means = [tiny.one_by_one(model, rows[i : i + 2]).item() for i in range(0, 8, 2)]
    assert abs(sum(means) / 4 - want.item()) > 1e-4
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        run = trainer(tmp_path / str(batch), tiny.adapted(), rows, max_steps=1, per_device_train_batch_size=batch,
                      gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=1.0)  # fmt: skip
        before = {n: p.detach().clone() for n, p in tiny.tensors(run.model).items()}
        run.train()
        assert tiny.losses(run) == pytest.approx([want.item()], abs=1e-6)
        for (name, p), q in zip(tiny.tensors(run.model).items(), tiny.tensors(model).values(), strict=True):
            assert q.grad is not None and torch.allclose(before[name] - p, q.grad, atol=1e-6), name  # the gradient itself

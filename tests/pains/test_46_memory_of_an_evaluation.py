"""No. 46: an evaluation keeps sums, not logits: ten times the rows make no larger tensor, and the loss is their mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama as tiny
import torch
from packed_runs import packed
from test_45_logits_of_a_large_vocabulary import Largest


def test_what_is_held_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    row, most = tiny.rows(1, seed=4), []
    losses = []
    for times in (8, 80):
        trainer = packed(tmp_path, None, evaluated=row * times, per_device_eval_batch_size=4, tokens=64)
        with Largest() as seen:
            losses.append(trainer.evaluate()["eval_loss"])
        most.append(seen.most)
    assert most[0] == most[1]
    with torch.no_grad():
        assert losses == pytest.approx([float(tiny.one_by_one(tiny.adapted(), row))] * 2, abs=1e-5)

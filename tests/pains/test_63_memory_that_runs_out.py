"""No. 63: a step that runs out of memory is done again with less at a time; where that ends, the message says what helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama as tiny
import torch
from full_memory import Full
from packed_runs import packed

from trimtab.errors import TrainingError


def run(folder: Path, *times: int) -> tuple[list[float], torch.Tensor]:
    trainer = packed(folder, tiny.rows(24), max_steps=3)
    assert trainer.packing is not None
    trainer.packing.engine.watch = Full(*times) if times else None
    trainer.train()
    return tiny.losses(trainer), torch.cat([p.detach().flatten() for p in tiny.tensors(trainer.model).values()])


def test_the_steps_are_the_same_steps(tmp_path: Path) -> None:
    (calm, end), (hit, end_of_hit) = run(tmp_path / "a"), run(tmp_path / "b", 3)
    assert hit == pytest.approx(calm, abs=1e-6) and torch.allclose(end, end_of_hit, atol=2e-5)


def test_where_nothing_is_left_to_halve_the_fixes_are_listed(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"out of memory with 64 tokens .*--load_in_4bit, --gradient_checkpointing"):
        run(tmp_path, *range(1, 100))

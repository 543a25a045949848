"""Runs in packs and padded ones on the tiny Llama, and rows that begin alike."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny_llama as tiny
import torch

from trimtab.engine.forward import Engine
from trimtab.train.batches import Together
from trimtab.train.packing import Packing
from trimtab.train.trainer import Trainer

STEM = [random.Random(9).randint(3, tiny.VOCABULARY - 1) for _ in range(40)]


def stemmed(n: int, seed: int = 0) -> list[tiny.Example]:
    """Ragged rows, of which three in four begin with the same forty tokens; one in eight is the row before once more."""
    found = tiny.rows(n, seed)
    for i, e in enumerate(found):
        if i % 4:
            e.input_ids, e.supervised = [*STEM, *e.input_ids], [i % 8 == 3] * len(STEM) + e.supervised
        if i % 8 == 7:
            e.input_ids, e.supervised = found[i - 1].input_ids, found[i - 1].supervised
    return found


def packed(folder: Path, examples: Any, model: Any = None, *, share: bool = True, most: int | None = None,
           tokens: int = 1024, evaluated: Any = None, callbacks: Any = (), stop_after: int = 1,
           **over: Any) -> Trainer:  # fmt: skip
    model = model if model is not None else tiny.adapted()
    return Trainer(
        model=model, args=tiny.arguments(folder, **over), train_dataset=examples, eval_dataset=evaluated,
        data_collator=Together(), packing=Packing(Engine(model), tokens, rows=most, share=share), callbacks=[*callbacks],
        stop_after_nonfinite=stop_after,
    )  # fmt: skip


def trained(*args: Any, resume: Path | None = None, **over: Any) -> Trainer:
    trainer = packed(*args, **over)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def padded(folder: Path, examples: Any, **over: Any) -> Trainer:
    trainer = Trainer(
        model=tiny.adapted(), args=tiny.arguments(folder, **over), train_dataset=examples, data_collator=tiny.collate
    )
    trainer.train()
    return trainer


def equal(mine: Any, theirs: Any) -> None:
    for name, tensor in tiny.tensors(theirs).items():
        assert torch.allclose(tiny.tensors(mine)[name], tensor, atol=2e-5), name

"""One rank of a two-process run: writes its losses and adapter. Started by `test_ranks.py` through torch's launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny_llama as tiny

from trimtab.engine.forward import Engine
from trimtab.train.batches import Together
from trimtab.train.packing import Packing
from trimtab.train.trainer import Trainer


def trainer(folder: Path, micro: int, layout: str = "padded") -> Trainer:
    """Eight rows a step in all. In packs each rank has its own number of them."""
    model = tiny.adapted()
    packing = Packing(Engine(model), 64) if layout == "packed" else None
    return Trainer(
        model=model,
        args=tiny.arguments(folder, per_device_train_batch_size=micro, save_strategy="steps", save_steps=3),
        train_dataset=tiny.rows(40),
        eval_dataset=tiny.rows(21, seed=1),
        data_collator=Together() if packing else tiny.collate,
        packing=packing,
    )


def main(folder: Path, layout: str) -> None:
    run = trainer(folder, micro=2, layout=layout)
    run.train()
    loss = run.evaluate()["eval_loss"]
    totals = run.totals()
    if run.is_world_process_zero():
        tensors = {name: p.tolist() for name, p in tiny.tensors(run.model).items()}
        counts = {"tokens": totals.tokens, "computed": totals.computed}
        found = {"losses": tiny.losses(run), "eval": loss, "tensors": tensors, **counts}
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

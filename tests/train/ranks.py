"""One rank of a two-process run: writes its losses and adapter. Started by `test_ranks.py` through torch's launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny_llama as tiny

from trimtab.train.trainer import Trainer


def trainer(folder: Path, micro: int) -> Trainer:
    return Trainer(
        model=tiny.adapted(),
        args=tiny.arguments(folder, per_device_train_batch_size=micro, save_strategy="steps", save_steps=3),
        train_dataset=tiny.rows(40),
        eval_dataset=tiny.rows(21, seed=1),
        data_collator=tiny.collate,
    )


def main(folder: Path) -> None:
    run = trainer(folder, micro=2)
    run.train()
    loss = run.evaluate()["eval_loss"]
    totals = run.totals()
    if run.is_world_process_zero():
        tensors = {name: p.tolist() for name, p in tiny.tensors(run.model).items()}
        found = {"losses": tiny.losses(run), "eval": loss, "tokens": totals.tokens, "tensors": tensors}
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

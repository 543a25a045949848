"""A tuned adapter on a tiny model, as `trimtab train` leaves it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # the tiny model and its rows are written there

from model_folder import write_model, write_rows


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train once for each set of options; the adapter folder."""
    from trimtab.train.options import TrainOptions
    from trimtab.train.run import run

    torch.set_num_threads(1)  # tiny layers: a second thread only waits
    place = tmp_path_factory.mktemp("tuned")
    base, rows = write_model(place / "tiny-llama"), write_rows(place / "rows.jsonl")
    done: dict[str, Path] = {}

    def train(**over: Any) -> Path:
        key = repr(sorted(over.items()))
        if key not in done:
            out = place / f"out-{len(done)}"
            given: dict[str, Any] = dict(
                model=str(base), dataset=[str(rows)], batch_size=8, max_steps=5, learning_rate=2e-2, dtype="float32"
            )
            run(TrainOptions(**given | over, output_dir=str(out)), console=Console(file=io.StringIO()))
            done[key] = out
        return done[key]

    return train

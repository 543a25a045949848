"""What users bring: a tiny Llama with ragged rows of tokens, and a model folder with rows of text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from torch import Tensor


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def said(function: Any, *args: Any, **options: Any) -> tuple[Any, str]:
    """What a command returns, and what it says to its console."""
    from rich.console import Console

    heard = io.StringIO()
    return function(*args, console=Console(file=heard, width=300), **options), heard.getvalue()


def options(folder: Path, rows: Path, out: Path, **over: Any) -> Any:
    from trimtab.train.options import TrainOptions

    given: dict[str, Any] = dict(
        model=str(folder), dataset=[str(rows)], output_dir=str(out), batch_size=4, max_steps=2, learning_rate=1e-2,
        dtype="float32", compile="off", adapter_options={"r": 2},
    )  # fmt: skip
    return TrainOptions(**given | over)


_done: list[Path] = []


def finished(factory: Any) -> Path:
    """The folder of one run of two steps, with a checkpoint at each; `model` and `rows.jsonl` stand beside it."""
    if not _done:
        from model_folder import write_model, write_rows

        from trimtab.train.run import run

        place = factory.mktemp("finished")
        folder, rows = write_model(place / "model"), write_rows(place / "rows.jsonl")
        said(run, options(folder, rows, place / "out", save_steps=1, seed=5, adapter_options={"r": 2, "lora_alpha": 6}))
        _done.append(place / "out")
    return _done[0]

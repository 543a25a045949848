"""`trimtab demo`: the whole story on the bundled model, by the same functions as `train` and `merge`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from trimtab.cli import screen
from trimtab.cli.train import next_steps
from trimtab.errors import ConfigError
from trimtab.train.options import TrainOptions

ROWS = Path(__file__).parents[1] / "demo" / "rows.jsonl"
HELD_OUT = ROWS.with_name("held_out.jsonl")
ASKED = 4  # held-out prompts answered before and after
BARS = "▁▂▃▄▅▆▇█"


def demo(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", metavar="FOLDER", help="where adapter and merged model are written")
    ] = Path("demo-out"),
) -> None:
    """Rows in, a tuned model out: the whole story in minutes, offline, on a CPU."""
    from trimtab.demo.model import NAME, bundled_model

    started, out = time.monotonic(), screen.console()
    adapter, merged = output_dir / "adapter", output_dir / "merged"
    make_way(merged)
    _step(out, 1, f"The model: {NAME}, 135 million parameters, bundled (its first use converts it: half a minute)")
    model = bundled_model()
    out.print(Text(f"{model}"), soft_wrap=True)
    rows, held_out = _read(ROWS), _read(HELD_OUT)
    _step(out, 2, f"The rows: {len(rows)} to learn from and {len(held_out)} held out; the speaker asks for a voice")
    for row in rows[:3]:
        out.print(Text(json.dumps(row, ensure_ascii=False), "dim"))
    _step(out, 3, "Training: LoRA, 2 % of the parameters, with a look at the held-out rows before and after")
    options = _options(model, adapter, _prompts(held_out))
    from trimtab.export.merge import merge
    from trimtab.train.run import run

    run(options, console=out)
    _step(out, 4, "How the loss fell")
    out.print(Text(_curve(adapter / "metrics.jsonl", out)), soft_wrap=True)
    out.print(Text(f"the same as a picture: {adapter / 'loss.png'}"), soft_wrap=True)
    _step(out, 5, "Merging: adapter and model as one plain model, compared on probe prompts")
    merge(adapter, merged, console=out)
    out.print(Text(f"written   {merged}"), soft_wrap=True)
    _step(out, 6, f"Done in {_clock(time.monotonic() - started)}. Now it is yours; try: {held_out[0]['input']}")
    next_steps(options, out)


def _options(model: Path, adapter: Path, prompts: list[str]) -> TrainOptions:
    return TrainOptions(
        dataset=[str(ROWS)],
        val_dataset=[str(HELD_OUT)],
        model=str(model),
        output_dir=str(adapter),
        batch_size=4,
        learning_rate=1e-3,
        sample_prompts=prompts,
        adapter_options={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    )


def make_way(merged: Path) -> None:
    """A merged model of an earlier demo makes way; anything else of that name is the user's."""
    if (merged / "merge_report.json").is_file():
        shutil.rmtree(merged)
    elif merged.exists():
        raise ConfigError(f"{merged} exists and is not an earlier demo's: choose another --output_dir")


def _step(out: Console, number: int, text: str) -> None:
    out.print(Text.assemble("\n", (f"{number}. ", "bold cyan"), (text, "bold")))


def _read(path: Path) -> list[dict[str, Any]]:
    """Lines end at "\\n" alone: a string may hold U+2028."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _prompts(rows: list[dict[str, Any]]) -> list[str]:
    """One prompt of each speaker first, so that the voices can be told apart."""
    first = {row["input"].partition("#")[0]: row["input"] for row in reversed(rows)}
    return list(first.values())[::-1][:ASKED]


def _curve(metrics: Path, out: Console) -> str:
    losses = [line["loss"] for line in _read(metrics) if "loss" in line]
    signs = BARS if "utf" in out.encoding.lower() else ".:-=+*#%"
    return f"{losses[0]:.2f} {sparkline(losses, signs)} {losses[-1]:.2f}"


def sparkline(values: Sequence[float], signs: str = BARS, width: int = 60) -> str:
    """A curve in one line: each sign the mean of its stretch, between the lowest and the highest of them."""
    n = min(width, len(values))
    edges = [i * len(values) // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(signs) - 1) / (high - low) if high > low else 0.0
    return "".join(signs[round((mean - low) * scale)] for mean in means)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"

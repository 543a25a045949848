"""`loss.png`: what the loss did, on the training rows and on those held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.files import write

SMOOTH = 0.1  # weight of a new step in the running mean


def draw(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the lines of a `metrics.jsonl`."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no state that others share

    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(
            steps,
            losses,
            color="#8ab6d6",
            linewidth=1,
            marker="." if len(steps) == 1 else "",
            label="training, each step",
        )
        if len(train) >= 10:
            axes.plot(steps, smoothed(losses), color="#1f5f8b", linewidth=2, label="training, running mean")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#d1495b", marker="o", markersize=5, linewidth=1.5, label="validation"
        )
        last = held_out[-1]
        label: Any = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "color": "#d1495b"}
        axes.annotate(f"{last[1]:.3f}", last, bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1}, **label)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    write(path, lambda place: figure.savefig(place, format="png"))


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean that is not drawn to zero at its begin."""
    out: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean, weight = mean + SMOOTH * (value - mean), weight + SMOOTH * (1 - weight)
        out.append(mean / weight)
    return out

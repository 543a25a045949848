"""The table and the picture of bench/methods.py, from the runs that are there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Line = dict[str, Any]
BASE = "base"
HEAD = ("method", "exact match", "loss", "steps", "trained", "adapter", "tokens/s", "peak memory", "learning rate", "of")
NOTES = """\
- exact match, loss: on rows that nothing was chosen by. The loss is the mean over the tokens of the answers.
- learning rate: the one of three with the lowest loss on other held-out rows after {search}; *of* shows those losses. An
  arrow: it is the highest (↑) or lowest (↓) that was tried, so a better one may lie beyond.
- All linear layers are adapted where a method takes them, else those that it takes by default; all its other options are
  the defaults, LoRA's and its variants' r=8 and alpha=16.
- steps: how many, and of how many examples. trained: numbers that are trained. adapter: the size of its file. tokens/s: the
  examples' own tokens over the seconds of training, layers not compiled. peak memory: of the whole process, model included.
"""


def choose(lines: list[Line]) -> float | None:
    """The learning rate with the lowest validation loss; none where all runs failed."""
    good = [line for line in lines if math.isfinite(line.get("val_loss", math.nan))]
    return min(good, key=lambda line: line["val_loss"])["rate"] if good else None


def finals(lines: list[Line]) -> list[Line]:
    """The last final run of each method, the best first."""
    found = {line["method"]: line for line in lines if line["stage"] == "final" and "failed" not in line}
    return sorted(found.values(), key=lambda line: (-line["exact_match"], line["loss"]))


def failures(lines: list[Line]) -> dict[str, str]:
    """Why a method has no final run: what its last run said."""
    done = {line["method"] for line in finals(lines)}
    return {line["method"]: line["failed"] for line in lines if "failed" in line and line["method"] not in done}


def searched(lines: list[Line], final: Line) -> list[Line]:
    same = [line for line in lines if line["method"] == final["method"] and line["stage"] == "search"]
    latest = {line["rate"]: line for line in same if all(line[k] == final[k] for k in ("rows", "batch_size"))}
    return sorted(latest.values(), key=lambda line: line["rate"])


def table(lines: list[Line], header: dict[str, Any]) -> str:
    done = finals(lines)
    text = ["# What each method learns", "", *_about(done, header), "", "![Exact match of each method](methods.png)", ""]
    text += ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 2) + "---|"]
    text += ["| " + " | ".join(_row(line, searched(lines, line))) + " |" for line in done]
    text.append("")
    if failed := failures(lines):
        text += ["Without a result:", "", *(f"- {name}: {why}" for name, why in sorted(failed.items())), ""]
    epochs = sorted({line["epochs"] for line in lines if line["stage"] == "search"})
    search = " or ".join(f"{e:g} epoch{'s' * (e != 1)}" for e in epochs) or "a part of the budget"
    return "\n".join(text) + "\n" + NOTES.format(search=search)


def _about(done: list[Line], header: dict[str, Any]) -> list[str]:
    if not done:
        return ["No run is done."]
    machine, trained = header["machine"], [line for line in done if line["method"] != BASE]
    first = (trained or done)[0]
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    sizes = " or ".join(str(n) for n in sorted({line["batch_size"] for line in trained or done}))
    busy = [line["others_cores"] for line in done if line.get("others_cores") is not None]
    found = [
        "- `python bench/methods.py`",
        f"- {first['model']} on banking77 (a message, one of 77 intents): {first['rows']:,} rows, {first['epochs']:g} epochs, "
        f"{sizes} examples a step; {first['val']} rows choose the learning rate, {first['test']} others are "
        "answered",
        f"- {machine['cpu']}, {machine['cores']} cores, bf16 units: {machine['bf16']}; {machine['system']}",
        f"- {versions}",
    ]
    return found + ([f"- cores that other programs used meanwhile: up to {max(busy):.1f}"] if busy else [])


def _row(line: Line, tried: list[Line]) -> list[str]:
    right = f"{100 * line['exact_match']:.1f} %"
    if line["method"] == BASE:
        return ["*the model untouched*", right, f"{line['loss']:.3f}", *["" for _ in HEAD[3:]]]
    known = [t["rate"] for t in tried]
    edge = "" if len(known) < 2 else " ↑" if line["rate"] == known[-1] else " ↓" if line["rate"] == known[0] else ""
    losses = ", ".join(f"{t['rate']:g}: {t['val_loss']:.3f}" if "val_loss" in t else f"{t['rate']:g}: failed" for t in tried)
    return [
        line["method"],
        right,
        f"{line['loss']:.3f}",
        f"{line['steps']} x {line['batch_size']}",
        f"{line['trainable_parameters']:,}",
        size(line["adapter_bytes"]),
        f"{line['tokens_per_second']:,.0f}",
        f"{line['peak_memory_bytes'] / 2**30:.1f} GB",
        f"{line['rate']:g}{edge}",
        losses,
    ]


def size(count: float) -> str:
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.1f} KB"


def picture(lines: list[Line], path: Path) -> None:
    """Exact match of each method, the best on top, and beside it how many numbers it trains."""
    from matplotlib.figure import Figure

    done = finals(lines)
    trained = [line for line in done if line["method"] != BASE]
    if not trained:
        return
    figure = Figure(figsize=(9, 0.24 * len(trained) + 1.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = range(len(trained))
    left.barh(places, [100 * line["exact_match"] for line in trained], color="#1b6ca8", height=0.7)
    left.set_yticks(places, [line["method"] for line in trained], fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_title(f"exact match on {trained[0]['test']} held-out rows, %", fontsize=9, loc="left")
    for line in done:
        if line["method"] == BASE:
            left.axvline(100 * line["exact_match"], color="#d1495b", linewidth=1, label="the model untouched")
            left.legend(frameon=False, fontsize=8, loc="lower right")
    right.scatter([line["trainable_parameters"] for line in trained], places, s=14, color="#1b6ca8")
    right.set_xscale("log")
    right.grid(axis="x", alpha=0.3)
    right.set_title("numbers trained", fontsize=9, loc="left")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

"""The table and the picture of a bench, from the cells that are there."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops import share_of_peak
from results import Cell
from works import WORKS

NOTES = """\
How to read it:
- A cell is one process that trains one adapter. The contenders of a work take turns, round after round, so that a machine
  which drifts hits all of them alike; ratios are taken inside a round. Figures are medians over the rounds, (least - most).
- tokens/s: the examples' own tokens (no padding counted) over the seconds of training, first step and compilation included.
  Steady: the same without the first 10 steps.
- All train the same adapter from the same start on the same rows in file order, batch after batch, at a constant learning
  rate; only the number of rows differs (column *rows*; the first of the file), so last losses compare where rows are equal.
  trl starts from its own adapter, packs its own batches, also learns what the template writes after an answer, and where
  its batch is smaller that is in its name.
- x peft_trainer: against its fastest micro-batch. One that was over a fifth slower in the first round is not repeated.
- Computed: tokens that went through the model for each token seen; below 1 where prefixes are shared.
- Of the matmul peak: FLOPs of the linear layers (see `bench/flops.py`) at the steady speed, over the rate of a bare
  matmul of the model's own shapes, measured before each of our cells.
"""
HEAD = (
    "work", "contender", "rows", "rounds", "tokens/s", "steady", "x peft_trainer", "x tutorial", "peak memory",
    "computed", "of the matmul peak", "first loss", "last loss",
)  # fmt: skip
GREY, RED, SAND = "#8d99ae", "#d6a2a2", "#b7b18f"
COLOURS = {"trimtab": "#1b6ca8", "peft_trainer": GREY, "tutorial": RED, "trl_sft": SAND, "trl_packing": SAND}


@dataclass
class Entry:
    """One contender in one work: its cells, one a round, or why there are none."""

    work: str
    contender: str
    kind: str
    cells: list[Cell]
    failed: str | None = None

    def values(self, name: str) -> list[float]:
        return [cell[name] for cell in self.cells if cell.get(name) is not None]

    @property
    def speed(self) -> float:
        return statistics.median(self.values("tokens_per_second")) if self.cells else 0.0

    def over(self, other: Entry | None) -> list[float]:
        """The ratios of speed, round by round where both ran."""
        theirs = {cell["round"]: cell["tokens_per_second"] for cell in other.cells} if other else {}
        return [c["tokens_per_second"] / theirs[c["round"]] for c in self.cells if c["round"] in theirs]


def entries(cells: list[Cell]) -> list[Entry]:
    """Grouped, the works in their own order, contenders as they ran."""
    found: dict[tuple[str, str, int], Entry] = {}
    order = list(WORKS)
    for cell in sorted(cells, key=lambda c: order.index(c["work"])):
        key = cell["work"], cell["contender"], cell["rows"]
        entry = found.setdefault(key, Entry(cell["work"], cell["contender"], cell["kind"], []))
        if "failed" in cell:
            entry.failed = cell["failed"]
        else:
            entry.cells.append(cell)
    return list(found.values())


def fastest(group: list[Entry], work: str, kind: str) -> Entry | None:
    """The variant of a peer with the highest median speed in a work."""
    ran = [e for e in group if e.work == work and e.kind == kind and e.cells]
    return max(ran, key=lambda e: e.speed, default=None)


def lagging(cells: list[Cell], work: str, margin: float = 0.8) -> set[str]:
    """Who need not run again in a work: whoever failed, and micro-batches over a fifth slower than peft's best."""
    group = [e for e in entries(cells) if e.work == work]
    best = fastest(group, work, "peft_trainer")
    slow = {e.contender for e in group if best and e.kind == best.kind and e.speed < margin * best.speed}
    return slow | {e.contender for e in group if e.failed}


# ---- the table


def table(header: Cell, commands: list[str], cells: list[Cell], losses: list[Cell]) -> str:
    group = entries(cells)
    lines = ["# Results", "", *_about(header, commands, cells), "", "![Tokens/s of each work](results.png)", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    lines += ["| " + " | ".join(_row(e, group, header)) + " |" for e in group]
    lines += [
        "",
        "Works: " + "; ".join(f"*{w}*: {WORKS[w].about}" for w in dict.fromkeys(e.work for e in group)) + ".",
        "",
    ]
    return "\n".join(lines) + "\n" + NOTES + _losses([line for line in losses if line["code"] == header["code"]])


def _about(header: Cell, commands: list[str], cells: list[Cell]) -> list[str]:
    machine, settings = header["machine"], header["settings"]
    card = f"{header['card']}; " if header.get("card") else ""
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GB" if machine["memory_bytes"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    peaks = [cell["matmul_peak"] / 1e12 for cell in cells if cell.get("matmul_peak")]
    busy = [cell["others_cores"] for cell in cells if cell.get("others_cores") is not None]
    found = [
        f"- begun {header['started']}",
        *(f"- `{command}`" for command in commands),
        f"- {card}{machine['cpu']}, {machine['cores']} cores, bf16 units: {machine['bf16']}{memory}; {machine['system']}",
        f"- {versions}; trimtab's sources {header['code']}",
        f"- {settings['model']}, LoRA r=8 on all linear layers, {settings['dtype']}, {settings['batch_size']} examples a step, "
        f"learning rate {settings['learning_rate']:g}, {settings['threads']} threads",
    ]
    if peaks:
        found.append(f"- matmul peak: {spread(peaks, '.2f')} TFLOP/s")
    if busy:
        found.append(f"- cores that other programs used meanwhile: {spread(busy, '.2f')}")
    return found


def _row(entry: Entry, group: list[Entry], header: Cell) -> list[str]:
    rows = str((entry.cells or [{"rows": ""}])[0]["rows"])
    if not entry.cells:
        return [entry.work, entry.contender, "", "", f"failed: {entry.failed}", *[""] * (len(HEAD) - 5)]
    first = entry.cells[0]
    shares = [s for s in (share_of_peak(cell, header["settings"]["sizes"]) for cell in entry.cells) if s is not None]
    computed = f"{first['tokens_computed'] / first['tokens']:.2f}" if "tokens_computed" in first else ""
    peft, tutorial = (fastest(group, entry.work, kind) for kind in ("peft_trainer", "tutorial"))
    return [
        entry.work,
        f"**{entry.contender}**" if entry.kind == "trimtab" else entry.contender,
        rows,
        str(len(entry.cells)),
        spread(entry.values("tokens_per_second"), ",.0f"),
        spread(entry.values("steady_tokens_per_second"), ",.0f"),
        spread(entry.over(peft), ".2f") if entry is not peft else "1",
        spread(entry.over(tutorial), ".1f") if entry is not tutorial else "1",
        f"{max(entry.values('peak_memory_bytes')) / 2**30:.1f} GB",
        computed,
        spread([100 * s for s in shares], ".0f") + (" %" if shares else ""),
        f"{first['losses'][0]:.4f}",
        f"{first['losses'][-1]:.4f}",
    ]


def spread(values: list[float], form: str) -> str:
    """`median (least - most)`; one value alone; nothing for none."""
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    return f"{middle} ({min(values):{form}} - {max(values):{form}})" if len(values) > 1 else middle


def _losses(lines: list[Cell]) -> str:
    """The last comparison of each kind for each work, made by losses.py."""
    last = {(line["work"], line["dtype"], line["steps"]): line for line in lines}
    if not last:
        return ""
    said = [
        f"| {line['work']} | {line['dtype']} | {line['steps']} | {line['batch_size']} | {line['ours'][-1]:.5f} "
        f"| {line['theirs'][-1]:.5f} | {line['said']} |"
        for line in last.values()
    ]
    head = ["", "## The same losses as peft_trainer", "", "`bench/losses.py`: same adapter, order and batches.", ""]
    columns = [
        "| work | dtype | steps | batch | our last loss | theirs | compared |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    return "\n".join([*head, *columns, *said]) + "\n"


# ---- the picture


def picture(header: Cell, cells: list[Cell], path: Path) -> None:
    """Tokens/s, a panel for each work, a bar for each contender, a thin line from its slowest to its fastest round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    group = [e for e in entries(cells) if e.cells]
    works = list(dict.fromkeys(e.work for e in group))
    if not works:
        return
    columns = min(2, len(works))
    tall = -(-len(works) // columns)
    most = max(sum(e.work == work for e in group) for work in works)
    size = (6.4 * columns, (0.34 * most + 0.9) * tall + 0.5)
    figure, axes = plt.subplots(tall, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, work in zip(axes.flat, works, strict=False):
        _panel(panel, [e for e in group if e.work == work], group)
    for panel in list(axes.flat)[len(works) :]:
        panel.set_visible(False)
    figure.suptitle(
        f"Training tokens/s, {header['settings']['model']}, {header.get('card') or header['machine']['cpu']}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(panel: Any, mine: list[Entry], group: list[Entry]) -> None:
    peft = fastest(group, mine[0].work, "peft_trainer")
    speeds = [e.speed for e in mine]
    panel.barh(range(len(mine)), speeds, color=[COLOURS[e.kind] for e in mine], height=0.72)
    for i, entry in enumerate(mine):
        rounds = entry.values("tokens_per_second")
        panel.plot([min(rounds), max(rounds)], [i, i], color="black", linewidth=1)
        ratio = f"   {statistics.median(entry.over(peft)):.1f} x" if peft and entry.kind == "trimtab" else ""
        panel.text(
            max(*rounds, entry.speed) + 0.015 * max(speeds), i, f"{entry.speed:,.0f}{ratio}", va="center", fontsize=9
        )
    panel.set_yticks(range(len(mine)), [e.contender for e in mine], fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.25 * max(speeds))
    panel.set_title(f"{mine[0].work}: {WORKS[mine[0].work].about}", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

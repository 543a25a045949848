"""`trimtab data check`: what is in the files, what will be trained, and what looks wrong, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.encode import Example
from trimtab.data.ends import UNENDED_SHARE, told, unended
from trimtab.data.ledger import Ledger
from trimtab.data.prepare import prepare
from trimtab.data.render import Renderer
from trimtab.data.show import bracketed, pieces, shorten

if TYPE_CHECKING:
    from rich.console import Console

BINS = 10
PAIRS_SHOWN = 5
ROW_CHARACTERS = 1600
Pair = tuple[str, str]  # file:line, file:line


@dataclass(frozen=True)
class Report:
    """The figures that `check` printed."""

    formats: list[str]
    ledger: Ledger
    lengths: list[tuple[int, int, int]]  # from, to (inclusive), examples
    duplicates: list[Pair]  # (first, repeat) within the training rows
    leaks: list[Pair]  # (training, validation)
    same_prompts: list[Pair]  # (training, validation) with the same prompt and another answer


def check(
    sources: Sequence[str | Path],
    renderer: Renderer,
    *,
    val_sources: Sequence[str | Path] = (),
    show: int = 3,
    console: Console | None = None,
    **options: Any,
) -> Report:
    """Print format, ledger, lengths, duplicates, leakage and `show` rows with their loss mask; return the figures.

    `options` are those of `prepare`. Raises `DataError` like it: rows with problems have no figures.
    """
    from rich.console import Console

    out = console or Console()
    data = prepare(sources, renderer, val_sources=val_sources, **options)
    leaks, same_prompts = _leaks(data.train, data.val)
    report = Report(data.formats, data.ledger, _histogram(data.train), _duplicates(data.train), leaks, same_prompts)
    _say(out, *report.formats, *(f"note: {notice}" for notice in renderer.notices))
    _say(out, "", *report.ledger.lines())
    _say(out, "", f"supervised: {_mask_rule(options.get('train_on', 'assistant'), renderer)}")
    if open_rows := unended(data.train, renderer):
        _say(out, f"{told(open_rows, len(data.train), renderer)}; a run refuses more than {100 * UNENDED_SHARE:.0f} %")
    _print_histogram(out, report.lengths)
    _print_pairs(out, "exact duplicates among the training rows", report.duplicates)
    if data.val:
        _print_pairs(out, "validation rows that are training rows", report.leaks)
        _print_pairs(out, "validation prompts that are training prompts, with another answer", report.same_prompts)
    for example in data.train[:show]:
        print_example(out, example, renderer.tokenizer)
    return report


def print_example(console: Console, example: Example, tokenizer: Any) -> None:
    """One row as the model reads it: the supervised text coloured and the masked text dim, or [[ ]] without colours."""
    from rich.text import Text

    head = f"{example.source}:{example.line}  {len(example.input_ids):,} tokens, {sum(example.supervised):,} supervised"
    shown = shorten(pieces(example, tokenizer), ROW_CHARACTERS)
    coloured = console.color_system is not None and not console.no_color
    _say(console, "", f"--- {head}")
    if coloured:
        console.print(Text.assemble(*((text, "bold green" if loss else "dim") for text, loss in shown)))
    else:
        _say(console, *bracketed(shown).rstrip("\n").split("\n"))


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _mask_rule(train_on: str, renderer: Renderer) -> str:
    closed = f"with {renderer.end_of_turn}" if renderer.end_of_turn else f"{renderer.tokenizer.eos_token} at the end"
    rules = {"assistant": f"the assistant's turns, {closed}", "last": f"the last assistant turn, {closed}",
             "all": "every token"}
    return f"{rules[train_on]} (train_on: {train_on})"


def _place(example: Example) -> str:
    return f"{example.source}:{example.line}"


def _content(example: Example) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    return tuple(example.input_ids), tuple(example.supervised)


def _prompt(example: Example) -> tuple[int, ...]:
    return tuple(example.input_ids[: example.supervised.index(True)])


def _duplicates(examples: list[Example]) -> list[Pair]:
    first: dict[Any, Example] = {}
    return [(_place(kept), _place(e)) for e in examples if (kept := first.setdefault(_content(e), e)) is not e]


def _leaks(train: list[Example], val: list[Example]) -> tuple[list[Pair], list[Pair]]:
    """Validation rows found among the training rows, and those of which only the prompt is."""
    if not val:
        return [], []
    rows, prompts = {_content(e): e for e in reversed(train)}, {_prompt(e): e for e in reversed(train)}
    leaks = [(_place(rows[key]), _place(e)) for e in val if (key := _content(e)) in rows]
    same = [(_place(prompts[key]), _place(e)) for e in val
            if _content(e) not in rows and (key := _prompt(e)) and key in prompts]
    return leaks, same


def _histogram(examples: list[Example]) -> list[tuple[int, int, int]]:
    """Up to ten bins of equal, round width (1, 2 or 5 times a power of ten)."""
    lengths = [len(e.input_ids) for e in examples]
    low, high = min(lengths), max(lengths)
    width = next(step for step in (m * 10**p for p in range(12) for m in (1, 2, 5))
                 if high // step - low // step < BINS)
    counts = [0] * (high // width - low // width + 1)
    for length in lengths:
        counts[length // width - low // width] += 1
    start = low // width * width
    return [(start + i * width, start + (i + 1) * width - 1, n) for i, n in enumerate(counts)]


def _print_histogram(console: Console, lengths: list[tuple[int, int, int]]) -> None:
    most = max(n for _, _, n in lengths)
    block = "█" if "utf" in console.encoding.lower() else "#"
    room = max(10, min(console.width, 100) - 30)
    _say(console, "", "length in tokens, number of training rows")
    for low, high, n in lengths:
        _say(console, f"{f'{low:,}-{high:,}':>15} {n:>9,}  {block * (-(-n * room // most) if n else 0)}".rstrip())


def _print_pairs(console: Console, what: str, pairs: list[Pair]) -> None:
    _say(console, "", f"{what}: {len(pairs):,}" if pairs else f"{what}: none")
    for a, b in pairs[:PAIRS_SHOWN]:
        _say(console, f"  {b} repeats {a}")
    if len(pairs) > PAIRS_SHOWN:
        _say(console, f"  and {len(pairs) - PAIRS_SHOWN:,} more")

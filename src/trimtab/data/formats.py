"""Which of the field's row formats a file is in, judged by its columns.

    format             columns
    alpaca             output, with instruction and/or input; system, history
    messages           messages [{"role", "content"}]; tools
    sharegpt           conversations [{"from", "value"}]; system, tools
    prompt/completion  prompt, completion: strings or message lists; tools
    preference         chosen, rejected, with prompt, messages or conversations; system, tools
    kto                label (true or false) beside messages, conversations or prompt/completion
    text               text
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trimtab.data.problems import Problems

if TYPE_CHECKING:
    from trimtab.data.read import Row

# (required columns, optional columns)
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpaca": (("output",), ("instruction", "input", "system", "history")),
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "prompt/completion": (("prompt", "completion"), ("system", "tools")),
    "preference": (("chosen", "rejected"), ("prompt", "messages", "conversations", "instruction", "input", "system",
                                            "tools")),
    "kto": (("label",), ("messages", "conversations", "prompt", "completion", "system", "tools")),
    "text": (("text",), ()),
}
_VERDICTS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
_OTHER_NAMES = {
    "response": "output", "answer": "output", "target": "output", "reply": "output", "question": "instruction",
    "query": "instruction", "dialog": "messages", "dialogue": "messages", "chat": "messages", "content": "text",
}


def verdict(label: Any) -> bool | None:
    """What a KTO row's label says of its answer, as JSON, CSV cells and spreadsheets write it; None where it is none."""
    return _VERDICTS.get(str(label).strip().lower()) if isinstance(label, (bool, int, float, str)) else None


def classify(fields: dict[str, Any]) -> str:
    """The format of one row, or "" when it fits none. Columns that are null count as absent: Parquet fills them in."""
    keys = {key for key, value in fields.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    spoken = "messages" in keys or "conversations" in keys or {"prompt", "completion"} <= keys
    if spoken and verdict(fields.get("label")) is not None:
        return "kto"
    for format in ("messages", "conversations"):
        if format in keys:
            return "sharegpt" if format == "conversations" else format
    if {"prompt", "completion"} <= keys:
        return "prompt/completion"
    if "output" in keys and keys & {"instruction", "input"}:
        return "alpaca"
    return "text" if "text" in keys and not keys & {"instruction", "output", "prompt", "completion"} else ""


def detect(rows: list[Row], problems: Problems) -> tuple[str, tuple[str, ...]]:
    """The format and the columns of one file's rows; marks each row with it. Rows of two formats are a problem."""
    if not rows:
        return "", ()
    first: dict[str, Row] = {}
    counts: Counter[str] = Counter()
    columns: dict[str, Row] = {}
    for row in rows:
        row.format = classify(row.fields)
        first.setdefault(row.format, row)
        counts[row.format] += 1
        for key in row.fields:
            columns.setdefault(key, row)
    known = [(format, count) for format, count in counts.most_common() if format]
    names = tuple(columns)
    format = known[0][0] if known else _resembled(names)
    if len(known) > 1:
        (a, n), (b, m) = ((f, first[f]) for f, _ in known[:2])
        problems.add(n.source, max(n.line, m.line), "",
                     f"two formats in one file: line {n.line} is {a}, line {m.line} is {b}",
                     "split the file by format; several files may be named together", "two formats in one file")
    if not format:
        _unknown(rows[0], names, problems)
    else:
        _misspelt(format, columns, problems)
    for row in rows:
        row.format = row.format or format
    return format, names


def _unknown(row: Row, names: Iterable[str], problems: Problems) -> None:
    renames = [f"{name!r} to {_OTHER_NAMES[name]!r}" for name in names if name in _OTHER_NAMES]
    fix = f"rename {', '.join(renames)}" if renames else "name the columns as one of: " + "; ".join(
        f"{format} ({', '.join(required)})" for format, (required, _) in FORMATS.items())
    problems.add(row.source, row.line, "", f"no known format in the columns {', '.join(names) or '(none)'}", fix,
                 "no known format")


def _resembled(names: tuple[str, ...]) -> str:
    """The format whose columns the names come near to, so that a misspelt file is told which column is wrong."""
    def score(format: str) -> float:
        required, optional = FORMATS[format]
        hits = sum(bool(near(column, names)) for column in required) / len(required)
        if format == "alpaca" and not any(near(column, names) for column in ("instruction", "input")):
            return 0.0
        return hits + 0.01 * sum(bool(near(column, names)) for column in optional) if hits else 0.0

    best = max(FORMATS, key=score)
    return best if score(best) >= 0.5 else ""


def near(column: str, names: Iterable[str]) -> str:
    """The name that is `column`, but for its case or a slip of the fingers; "" when there is none."""
    by_lower = {name.lower().strip(): name for name in names}
    close = difflib.get_close_matches(column, list(by_lower), n=1, cutoff=0.75)
    return by_lower[close[0]] if close else ""


def _misspelt(format: str, columns: dict[str, Row], problems: Problems) -> None:
    """An optional column under a near name would be left out in silence; a required one is reported row by row."""
    required, optional = FORMATS[format]
    unknown = [name for name in columns if name not in required and name not in optional]
    for column in optional:
        if column not in columns and (name := near(column, unknown)):
            row = columns[name]
            problems.add(row.source, row.line, name, f"unknown column; the {format} format knows {column!r}",
                         f"rename {name!r} to {column!r} in the file, or drop the column")


def describe(format: str, columns: Iterable[str]) -> str:
    """`alpaca (instruction, input, output); not used: id`."""
    if not format:
        return "no known format"
    required, optional = FORMATS[format]
    used = [name for name in columns if name in required or name in optional]
    unused = [name for name in columns if name not in used]
    return f"{format} ({', '.join(used)})" + (f"; not used: {', '.join(unused)}" if unused else "")

"""Problems in rows: collected wherever they are met, shown together, each with its place, its cause and its fix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from trimtab.errors import DataError

SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place. `kind` is the cause without its particulars: problems are counted by it."""

    source: str
    line: int  # 0: the file as a whole
    field: str
    cause: str
    fix: str
    kind: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        return f"{place}: {self.field + ': ' if self.field else ''}{self.cause}. Fix: {self.fix}"


class BadRows(DataError):
    """A `DataError` that carries its list of `problems`."""

    def __init__(self, message: str, problems: list[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


@dataclass
class Problems:
    """Every problem met on the way from files to examples; `raise_any` ends the way with all of them in one error."""

    found: list[Problem] = field(default_factory=list)

    def add(self, source: str, line: int, field: str, cause: str, fix: str, kind: str = "") -> None:
        self.found.append(Problem(source, line, field, cause, fix, kind or (f"{field}: {cause}" if field else cause)))

    def __bool__(self) -> bool:
        return bool(self.found)

    def raise_any(self) -> None:
        """Raise `BadRows` with the first 20 problems in full and the rest counted by cause."""
        if not self.found:
            return
        order = {name: i for i, name in enumerate(dict.fromkeys(map(_file, self.found)))}
        found = sorted(self.found, key=lambda p: (order[_file(p)], p.line))  # as they stand in each file
        files, count = len(order), len(found)
        where = f" in {files} files" if files > 1 else ""
        lines = [f"{count:,} problem{'s' if count > 1 else ''} in the data{where}:"]
        lines += [f"  {p}" for p in found[:SHOWN]]
        if rest := found[SHOWN:]:
            lines.append(f"  and {len(rest):,} more:")
            lines += [f"    {n:,} x {kind}" for kind, n in Counter(p.kind for p in rest).most_common()]
        raise BadRows("\n".join(lines), found)


def _file(problem: Problem) -> str:
    """Rows of an array on one line are called `rows.json[3]`."""
    return problem.source.partition("[")[0]

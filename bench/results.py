"""`results.jsonl`: what a bench was, then one line for each cell that is done. An interrupted bench goes on where it was."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
KEY = ("work", "contender", "rows", "round")


class Results:
    """The file in memory. Cells belong to one header (machine, versions, code, settings); under another one they would
    not compare, so `open` then puts the old file aside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Cell = {}
        self.commands: list[str] = []
        self.cells: list[Cell] = []
        for line in read_lines(path):
            if "header" in line:
                self.header = line["header"]
            elif "command" in line:
                self.commands.append(line["command"])
            else:
                self.cells.append(line)

    def open(self, header: Cell, command: str, *, fresh: bool = False) -> str | None:
        """Begin or go on; a line for the user where there were results."""
        said = None
        if self.header:
            changed = [name for name in header if self.header.get(name) != header[name]]
            if fresh or changed:
                aside = self._put_aside()
                why = "as asked" if fresh else f"another {' and '.join(changed)}"
                said = f"earlier results ({why}) are kept in {aside.name}"
                self.header, self.commands, self.cells = {}, [], []
            else:
                self.cells = [cell for cell in self.cells if "failed" not in cell]  # tried again
                said = f"going on with {len(self.cells)} results of {self.header['started']}"
        if not self.header:
            self.header = header | {"started": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")}
            self._append({"header": self.header})
        if command not in self.commands:
            self.commands.append(command)
            self._append({"command": command})
        return said

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self._append(cell)

    def has(self, key: Cell) -> bool:
        return any(all(cell[name] == key[name] for name in KEY) for cell in self.cells)

    def _append(self, line: Cell) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _put_aside(self) -> Path:
        number = next(n for n in range(1, 10**6) if not self.path.with_name(f"{self.path.stem}-{n}.jsonl").exists())
        return self.path.rename(self.path.with_name(f"{self.path.stem}-{number}.jsonl"))


def read_lines(path: Path) -> list[Cell]:
    """The lines of a file; what a kill cut short is cut off, so that the next line begins where a line begins."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.split("\n") if line]

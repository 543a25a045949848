"""Small is a promise: sizes of files and functions, and names that say what is inside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "trimtab"

FILE, FUNCTION = 400, 60  # lines
# lines that are not blank of each file in it; twice that for what several share
FOLDERS = {"bases": 100, "methods": 100, "inits": 100}
TOTALS = {"core": 1500}  # lines of all files in it
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "tools"}


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def length(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def too_long(root: Path) -> list[str]:
    found = []
    for file in files(root):
        name = file.relative_to(root)
        limit, n = FILE, length(file)
        if name.parts[0] in FOLDERS:
            limit = FOLDERS[name.parts[0]] * (2 if name.name.startswith("_") else 1)
            n = sum(bool(line.strip()) for line in file.read_text(encoding="utf-8").splitlines())
        if n > limit:
            found.append(f"{name}: {n} lines, the limit is {limit}")
    for folder, limit in TOTALS.items():
        if (n := sum(map(length, files(root / folder)))) > limit:
            found.append(f"{folder}/: {n} lines in all, the limit is {limit}")
    return found


def long_functions(root: Path) -> list[str]:
    found = []
    for file in files(root):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION:
                    found.append(f"{file.relative_to(root)}:{node.lineno}: {node.name} has {lines} lines")
    return found


def vague_names(root: Path) -> list[str]:
    names = [f.relative_to(root) for f in files(root)]
    return [str(n) for n in names if VAGUE & {p.removesuffix(".py").strip("_") for p in n.parts}]


def test_files_are_short() -> None:
    assert too_long(SRC) == []


def test_functions_are_short() -> None:
    assert long_functions(SRC) == []


def test_names_say_what_is_inside() -> None:
    assert vague_names(SRC) == []


@pytest.mark.parametrize(
    ("file", "lines", "found"),
    [
        ("train/run.py", 401, ["train/run.py: 401 lines, the limit is 400"]),
        ("train/run.py", 400, []),
        ("methods/lora.py", 101, ["methods/lora.py: 101 lines, the limit is 100"]),
        ("methods/prompt/x.py", 101, ["methods/prompt/x.py: 101 lines, the limit is 100"]),
        ("bases/dense.py", 100, []),
    ],
)
def test_a_long_file_is_found(tmp_path: Path, file: str, lines: int, found: list[str]) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("x = 1\n" * lines, encoding="utf-8")
    assert too_long(tmp_path) == found


def test_a_large_core_is_found(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    for i in range(4):
        (tmp_path / "core" / f"{i}.py").write_text("x = 1\n" * 380, encoding="utf-8")
    assert too_long(tmp_path) == ["core/: 1520 lines in all, the limit is 1500"]


def test_a_long_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class A:\n    def f(self):\n" + "        x = 1\n" * 60, encoding="utf-8")
    assert long_functions(tmp_path) == ["a.py:2: f has 61 lines"]


def test_a_vague_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "utils.py").touch()
    assert vague_names(tmp_path) == ["train/utils.py"]

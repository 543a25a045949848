"""What `trimtab data check` prints, and the figures behind it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from trimtab.data import Renderer, check

from . import tiny
from .tiny import write


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"instruction": q, "output": a} for q, a in pairs]


def test_figures_and_page(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", *rows(("a", "1"), ("b", "2"), ("a", "1"), ("c" * 150, "3")))
    write(tmp_path / "val.jsonl", *rows(("b", "2"), ("a", "other"), ("new", "4")))
    page = io.StringIO()
    report = check(["rows.jsonl"], Renderer(tiny.tokenizer()), val_sources=["val.jsonl"], show=1,
                   console=Console(file=page, width=80))
    assert report.duplicates == [("rows.jsonl:1", "rows.jsonl:3")]
    assert report.leaks == [("rows.jsonl:2", "val.jsonl:1")]
    assert report.same_prompts == [("rows.jsonl:1", "val.jsonl:2")]
    assert [n for _, _, n in report.lengths if n] == [3, 1] and sum(n for *_, n in report.lengths) == 4
    assert all(low % (high - low + 1) == 0 for low, high, _ in report.lengths)
    text = page.getvalue()
    for line in (
        "rows.jsonl: 4 rows, alpaca (instruction, output)",
        "train: 4 rows read, 4 kept;",
        "supervised: the assistant's turns, with <|im_end|> (train_on: assistant)",
        "exact duplicates among the training rows: 1",
        "  rows.jsonl:3 repeats rows.jsonl:1",
        "validation rows that are training rows: 1",
        "--- rows.jsonl:1  ",
        "[[1<|im_end|>]]",
    ):
        assert line in text
    assert "\x1b" not in text and max(map(len, text.split("\n"))) <= 80


def test_rows_that_teach_no_end_are_named(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", *rows(("a", "1"), ("b", "2" * 60)))
    page = io.StringIO()
    check(["rows.jsonl"], Renderer(tiny.tokenizer()), max_length=60, overlong="truncate_end",
          console=Console(file=page, width=200))
    line = "1 of 2 train rows do not end with a learnt <|im_end|> (rows.jsonl:2); a run refuses more than 1 %"
    assert line in page.getvalue().split("\n")


def test_colours_where_there_are_some(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", *rows(("a [bold]", "1")))
    page = io.StringIO()
    check(["rows.jsonl"], Renderer(tiny.tokenizer()),
          console=Console(file=page, width=100, force_terminal=True, color_system="truecolor"))
    text = page.getvalue()
    assert "\x1b[1;32m1<|im_end|>" in text and "[[" not in text
    assert "a [bold]<|im_end|>" in text, "text of rows is never read as markup"


def test_long_rows_are_shortened_in_the_middle(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", *rows(("begin" + "x" * 5000 + "end", "1")))
    page = io.StringIO()
    check(["rows.jsonl"], Renderer(tiny.tokenizer()), max_length=9000, console=Console(file=page, width=80))
    text = page.getvalue()
    assert "characters ...]" in text and "begin" in text and "end<|im_end|>" in text and len(text) < 4000

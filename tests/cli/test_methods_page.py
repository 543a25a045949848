"""docs/methods.md says what the methods do now, and nothing that they do is wrong."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.cli import facts
from trimtab.cli.methods import page
from trimtab.core.config import load, methods

DOCS = Path(__file__).parents[2] / "docs"
PEER = DOCS / "peft_methods.csv"


def test_the_page_is_not_stale() -> None:
    now, written = page(PEER), (DOCS / "methods.md").read_text(encoding="utf-8")
    assert now == written, "trimtab methods --markdown --peer docs/peft_methods.csv > docs/methods.md"
    own = now.partition("## The same of")[0]
    rows = {line.split(" | ")[0].removeprefix("| ") for line in own.split("\n") if line.startswith("| ")}
    assert rows - {"method", "---"} == set(methods())
    assert facts.WRONG not in own.replace("\n", " ").split("| ---")[-1]


def test_one_method_in_numbers() -> None:
    found = facts.facts(load("lora"))
    assert found.numbers == 8 * (4096 + 4096) and found.merges == "yes"
    assert found.cells | {"mixed batch": "", "attention": ""} == dict.fromkeys(facts.COLUMNS, "yes") | {
        "norm": "no", "mixed batch": "", "attention": ""
    }  # fmt: skip
    assert facts.facts(load("osf")).numbers == 2 * 4096 * 2048 + 2048  # U, V and S of the weaker half, by three smaller layers
    assert facts.facts(load("lily")).merges == "no"
    prompt = facts.facts(load("prompt_tuning"))
    assert (prompt.numbers, prompt.cells, prompt.merges) == (20 * 4096, {}, "no")


def test_the_peers_table_has_our_columns_and_only_known_cells() -> None:
    known = {"yes", "no", "forward", "wrong", "accident", "one", "?", "-"}
    rows = facts.read_peer(PEER)
    assert len(rows) > 50 and {c for row in rows.values() for c in row.values()} <= known
    with PEER.open(newline="") as file:
        assert set(next(csv.reader(file))) == {"method", "merges", *facts.COLUMNS}


@pytest.mark.parametrize(
    ("ours", "theirs", "better"), [("yes", "no", True), ("yes", "forward", True), ("forward", "accident", True),
    ("forward", "yes", False), ("yes", "-", False), ("no", "no", False), ("yes", "yes", False)],
)  # fmt: skip
def test_what_a_filled_hole_is(ours: str, theirs: str, better: bool) -> None:
    assert facts._better({"linear": ours}, {"linear": theirs}) == (["linear"] if better else [])


def test_the_command_says_it_for_one(run: Callable) -> None:
    shown = " ".join(run("methods", "lora").output.split())
    assert "trains 65,536 numbers for a 4096 x 4096 layer at its defaults" in shown and "to LoRA: yes" in shown

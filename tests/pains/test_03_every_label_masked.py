"""Rows that teach nothing: found before the first step, shown with the reason, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from situations import chats, tiny, trainer

from trimtab.data import Renderer, prepare
from trimtab.errors import DataError, TrainingError


def prepared(path: Path, *rows: Any, **options: Any) -> Any:
    return prepare([chats.write(path / "rows.jsonl", *rows)], Renderer(chats.tokenizer()), **options)


LONG = {"prompt": "a question that goes on and on", "completion": "an answer"}
MUTE = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "train": False}]}


@pytest.mark.parametrize(
    ("row", "options", "why"),
    [
        (LONG, {"max_length": 20, "overlong": "truncate_end"}, "cut at max_length 20, before any token that is learnt"),
        (MUTE, {}, "none of its turns is learnt with train_on: assistant"),
    ],
    ids=["cut off", "no turn"],
)
def test_it_is_an_error_that_shows_the_row(row: dict, options: dict, why: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepared(tmp_path, *[row] * 3, **options)
    said = str(error.value)
    assert "3 of 3 train rows have no supervised token" in said and why in said and "Fix: " in said
    assert "rows.jsonl:1" in said and "<|im_start|>user" in said


def test_one_of_two_hundred_is_left_out_and_counted(tmp_path: Path) -> None:
    good = [{"prompt": f"p{i}", "completion": "c"} for i in range(199)]
    rows = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "c"}]} for r in good]
    data = prepared(tmp_path, *rows, MUTE)
    assert len(data.train) == 199 and data.ledger.train.dropped["no supervised token"].rows == 1


@pytest.mark.parametrize("where", ["everywhere", "in a step"])
def test_rows_of_ones_own_are_looked_at_too(where: str, tmp_path: Path) -> None:
    """Labels that another tool made, straight into the trainer."""
    rows = tiny.rows(24)
    for row in rows if where == "everywhere" else rows[8:16]:
        row.supervised = [False] * len(row.supervised)
    said = "none of 24 examples has a supervised token" if where == "everywhere" else "step 2: no supervised token in the rows "
    with pytest.raises(TrainingError, match=said):
        trainer(tmp_path, tiny.adapted(), rows).train()

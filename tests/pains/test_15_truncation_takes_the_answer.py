"""Rows over the limit: left out and counted unless something else is asked for, and then what is cut is what was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from situations import chats

from trimtab.data import Renderer, prepare
from trimtab.errors import DataError

SHORT = {"prompt": "q", "completion": "short"}
LONG = {"prompt": "a question of many words, of which the first can go", "completion": "the whole answer"}
LIMIT = 70


def prepared(folder: Path, overlong: str) -> tuple[Any, list[list[str]]]:
    tok = chats.tokenizer()
    file = chats.write(folder / "rows.jsonl", *[SHORT] * 3, LONG)
    data = prepare([file], Renderer(tok), max_length=LIMIT, overlong=overlong)  # type: ignore[arg-type]
    assert all(len(e.input_ids) <= LIMIT for e in data.train)
    return data, [chats.learnt(e, tok) for e in data.train]


def test_by_default_it_is_left_out_and_counted(tmp_path: Path) -> None:
    data, said = prepared(tmp_path, "drop")
    assert said == [["short<|im_end|>"]] * 3
    dropped = data.ledger.train.dropped["longer than max_length 70"]
    assert dropped.rows == 1 and "rows.jsonl:4" in str(dropped.places)


def test_the_prompt_is_cut_and_never_the_answer(tmp_path: Path) -> None:
    data, said = prepared(tmp_path, "truncate_prompt")
    assert said[3] == ["the whole answer<|im_end|>"] and data.ledger.train.truncated == 1
    text = chats.tokenizer().decode(data.train[3].input_ids)
    assert text.startswith("<|im_start|>user\n") and len(data.train[3].input_ids) == LIMIT
    assert "can go<|im_end|>\n<|im_start|>assistant\n" in text and "a question" not in text


def test_the_end_is_cut_where_that_is_asked_for(tmp_path: Path) -> None:
    data, said = prepared(tmp_path, "truncate_end")
    assert data.ledger.train.truncated == 1 and "the whole answer".startswith(said[3][0])


def test_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:4"):
        prepared(tmp_path, "error")

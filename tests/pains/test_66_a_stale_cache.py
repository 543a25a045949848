"""No. 66: prepared rows are found again only while file, tokenizer, template, options and code are what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_folder import TEMPLATE, tokenizer

from trimtab.data import Renderer, prepare
from trimtab.data import cache as cache_module


def rows(path: Path, answers: str) -> Path:
    path.write_text("".join(json.dumps({"input": f"row {i}", "output": a}) + "\n" for i, a in enumerate(answers)))
    return path


def ids(path: Path, tok: Any = None, **options: Any) -> list[list[int]]:
    return [e.input_ids for e in prepare([path], Renderer(tok or tokenizer()), **options).train]


def with_template(new: str) -> Any:
    tok = tokenizer()
    tok.chat_template = new
    return tok


def another_end() -> Any:
    tok = tokenizer()
    tok.pad_token = "<|im_start|>"
    return tok


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "edited rows": lambda path: rows(path, "abd") and {},
    "fewer rows asked for": lambda path: {"max_train_samples": 2},
    "a shorter limit": lambda path: {"max_length": 200},
    "other turns": lambda path: {"train_on": "all"},
    "another template": lambda path: {"tok": with_template(TEMPLATE.replace("\n", " "))},
    "another tokenizer": lambda path: {"tok": another_end()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_prepared_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    path = rows(tmp_path / "rows.jsonl", "abc")
    stored = lambda: {f.name for f in cache_module.folder().iterdir()}  # noqa: E731
    first = ids(path)
    one = stored()
    assert len(one) == 1 and ids(path) == first and stored() == one  # the same is found again
    options = CHANGES[change](path)
    got = ids(path, **options)
    assert len(stored()) == 2
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "empty"))
    assert got == ids(path, **options)
    if change in ("edited rows", "fewer rows asked for", "another template"):
        assert got != first


def test_other_code_is_prepared_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    path = rows(tmp_path / "rows.jsonl", "abc")
    first = ids(path)
    monkeypatch.setattr(cache_module, "_code", lambda: "another")
    assert ids(path) == first and len(list(cache_module.folder().iterdir())) == 2

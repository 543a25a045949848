"""No. 54: ten malformed files: each error has the file, the line, what was found, what was expected."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from model_folder import tokenizer

from trimtab.data import Renderer, prepare
from trimtab.errors import DataError, TrimtabError

GOOD = '{"input": "x", "output": "y"}'
TURNS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no answer": ([GOOD, '{"input": "x"}'], ["rows.jsonl:2", "output"]),
    "a misspelt key": ([GOOD, '{"input": "x", "ouput": "y"}'], ["rows.jsonl:2", "ouput", "output"]),
    "cut off": ([GOOD, '{"input": "x", "outp'], ["rows.jsonl:2", "JSON"]),
    "a list": ([GOOD, '["x", "y"]'], ["rows.jsonl:2"]),
    "a number": ([GOOD, '{"input": "x", "output": 3}'], ["rows.jsonl:2", "output"]),
    "an empty answer": ([GOOD, '{"input": "x", "output": " "}'], ["rows.jsonl:2", "output", "empty"]),
    "an unknown role": ([TURNS.replace("user", "narrator")], ["rows.jsonl:1", "narrator"]),
    "a turn without content": ([TURNS.replace('"content": "b"', '"text": "b"')], ["rows.jsonl:1", "content"]),
    "nobody answers": ([TURNS.replace("assistant", "user")], ["rows.jsonl:1", "assistant"]),
    "two formats": ([GOOD, TURNS], ["rows.jsonl:2"]),
    "unknown keys": (['{"frage": "x", "antwort": "y"}'], ["rows.jsonl:1", "frage", "antwort"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_error_has_the_place_and_the_words(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    lines, words = WRONG[case]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(TrimtabError) as caught:
        prepare([tmp_path / "rows.jsonl"], Renderer(tokenizer()))
    assert isinstance(caught.value, DataError)
    assert all(re.search(re.escape(word), str(caught.value)) for word in words), str(caught.value)


def test_a_path_works_directly_whatever_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    same = [
        {"instruction": "x", "output": "y"},
        {"prompt": "x", "completion": "y"},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    found = []
    for i, row in enumerate(same):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
        found.append(prepare([tmp_path / f"{i}.jsonl"], Renderer(tokenizer())).train[0].input_ids)
    assert len(found[0]) > 5 and found == [found[0]] * 4

"""Rows of the bench: made as they are described, and nothing lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from works import DEFAULT, DEMO, TURN, WORKS, Rows, as_messages, long_rows, read, shared_rows, write


def words(text: str) -> int:
    return len(text.split())


def alpaca(n: int, words_each: int = 3) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}", "input": "", "output": "a " * words_each} for i in range(n)]


def chats(n: int) -> list[dict[str, list[dict[str, str]]]]:
    return [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(n)
    ]


def test_shared_rows_begin_alike_and_list_every_intent() -> None:
    rows = [{"instruction": "Classify.", "input": f"m{i}", "output": f"x{i}"} for i in range(3)]
    found = shared_rows(rows, ["card arrival", "age limit"])
    assert {row["instruction"] for row in found} == {"Classify. The intents are: card arrival, age limit."}
    assert [(row["input"], row["output"]) for row in found] == [("m0", "x0"), ("m1", "x1"), ("m2", "x2")]
    assert rows[0]["instruction"] == "Classify."


def test_alpaca_rows_become_messages_as_the_peers_read_them() -> None:
    row = {"instruction": "Classify.", "input": "hello", "output": "greeting"}
    assert as_messages(row) == [
        {"role": "user", "content": "Classify.\nhello"},
        {"role": "assistant", "content": "greeting"},
    ]
    assert as_messages({"input": "hello", "output": "greeting"})[0]["content"] == "hello"


def test_long_rows_alternate_and_come_near_the_length() -> None:
    first, second = chats(60), alpaca(40, words_each=3)  # 2 and 5 words, and TURN for each
    found = long_rows(first, second, words, length=100)
    sizes = [sum(words(m["content"]) for m in row["messages"]) + TURN * len(row["messages"]) // 2 for row in found]
    assert all(abs(size - 100) <= (5 + TURN) / 2 for size in sizes), sizes
    assert all(row["messages"][-1]["role"] == "assistant" for row in found)
    asked = [m["content"] for row in found for m in row["messages"] if m["role"] == "user"]
    assert asked[:4] == ["q0", "Say 0", "q1", "Say 1"]
    assert asked[80:82] == ["q40", "q41"]  # the second list has ended
    assert len(set(asked)) == len(asked)


def test_one_row_that_is_longer_than_the_length_stands_alone() -> None:
    found = long_rows(alpaca(3, words_each=500), [], words, length=100)
    assert [len(row["messages"]) for row in found] == [2, 2]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"input": "line\u2028separator", "output": "ok"}, {"input": "é", "output": "ja"}]
    assert read(write(rows, tmp_path / "rows.jsonl")) == rows


def test_a_made_file_is_made_once_and_missing_files_are_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write([{"instruction": "Classify.", "input": "m", "output": "x"}], data / "banking77_train.jsonl")
    rows = Rows(data, tmp_path, words)
    assert rows.missing(WORKS["shared"]) == ["banking77_intents.json"]
    assert rows.missing(WORKS["short"]) == []
    (data / "banking77_intents.json").write_text('["a", "b"]')
    made = rows.file(WORKS["shared"])
    assert read(made)[0]["instruction"] == "Classify. The intents are: a, b."
    made.unlink()
    assert rows.file(WORKS["shared"]) == made  # not made again
    assert not made.exists()
    assert rows.file(WORKS["short"]) == data / "banking77_train.jsonl"


def test_the_work_without_a_data_folder_has_the_rows_of_the_package(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "nowhere", tmp_path, words)
    assert rows.missing(WORKS["demo"]) == []
    assert len(read(rows.file(WORKS["demo"]))) == WORKS["demo"].rows["trimtab"] == len(read(DEMO))


@pytest.mark.parametrize("name", DEFAULT)
def test_every_work_measures_us_and_a_fair_peer_in_whole_batches(name: str) -> None:
    work = WORKS[name]
    assert {"trimtab", "peft_trainer"} <= set(work.rows)
    assert all(n % 16 == 0 for n in work.rows.values())

"""Rows of every format become the same conversations; what is wrong with a row is said by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.data import Conversation, conversations, read
from trimtab.data.problems import BadRows
from trimtab.errors import DataError

from .tiny import write

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def parse(tmp_path: Path, *rows: Any) -> list[Conversation]:
    return conversations(read([write(tmp_path / "rows.jsonl", *rows)]))


def refusal(tmp_path: Path, *rows: Any) -> str:
    with pytest.raises(DataError) as error:
        parse(tmp_path, *rows)
    return str(error.value).replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hi", "output": "yo"},
        {"instruction": "hi", "input": "", "output": "yo"},
        {"input": "hi", "output": "yo"},
        {"messages": [U, A]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, A]},
        {"messages": [{**U, "name": None}, {**A, "tool_calls": None}], "tools": "[]"},
        {"messages": json.dumps([U, A])},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"conversations": [U, A]},
        {"prompt": "hi", "completion": "yo"},
        {"prompt": [U], "completion": [A]},
        {"prompt": [U], "completion": A},
    ],
)
def test_one_conversation_from_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    (conversation,) = parse(tmp_path, row)
    assert (conversation.messages, conversation.tools, conversation.line) == ([U, A], None, 1)
    assert (conversation.prompt, conversation.answer) == ([U], "yo")


def test_alpaca_joins_instruction_and_input_and_unrolls_history(tmp_path: Path) -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["q", "r"]]}
    (conversation,) = parse(tmp_path, row)
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\nb"), ("assistant", "c")]


def test_tool_calls_have_one_form(tmp_path: Path) -> None:
    want = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    sharegpt = {"conversations": [
        {"from": "human", "value": "1"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "two"},
    ], "tools": '[{"name": "add", "parameters": {}}]'}
    (conversation,) = parse(tmp_path, sharegpt)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == want
    assert conversation.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (conversation,) = parse(tmp_path, {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": want}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yo"},
         "rejected": {"from": "gpt", "value": "no"}},
        {"chosen": [U, A], "rejected": [U, {"role": "assistant", "content": "no"}]},
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, {"role": "assistant", "content": "no"}]},
    ],
)
def test_preference_rows_share_a_prompt(tmp_path: Path, row: dict[str, Any]) -> None:
    (conversation,) = parse(tmp_path, row)
    assert conversation.messages == [U, A] and conversation.shared == 1
    assert conversation.rejected == [U, {"role": "assistant", "content": "no"}]


def test_kto_text_and_flags(tmp_path: Path) -> None:
    assert [c.label for c in parse(tmp_path, {"messages": [U, A], "label": False})] == [False]
    assert [c.label for c in parse(tmp_path, {"prompt": "a", "completion": "b", "label": True})] == [True]
    assert [c.text for c in parse(tmp_path, {"text": "once"})] == ["once"]
    (conversation,) = parse(tmp_path, {"messages": [U, {**A, "weight": 0}, U, {**A, "train": True}]})
    assert [m.get("train") for m in conversation.messages] == [None, False, None, True]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"instruction": "a", "ouput": "b"}, "output: missing; found instruction, ouput. Fix: rename 'ouput' to 'out"),
        ({"instrution": "a", "input": "b", "output": "c"}, "instrution: unknown column; the alpaca format knows"),
        ({"instruction": "a", "output": ""}, "output: empty answer"),
        ({"instruction": "a", "output": " \n"}, "output: empty answer"),
        ({"instruction": "a", "output": 5}, "output: must be a string, found int"),
        ({"instruction": "", "input": "", "output": "b"}, "instruction: instruction and input are both empty"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0]: must be a pair of strings"),
        ({"messages": "[" * 100_000}, "messages: nested too deeply"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages: half of a surrogate pair"),
        ({"question": "a", "answer": "b"}, "no known format in the columns question, answer. Fix: rename 'question"),
        ({"messages": []}, "messages: must be a list of messages, found an empty list"),
        ({"messages": "{"}, "messages: not JSON"),
        ({"messages": [U]}, "messages: no assistant turn"),
        ({"messages": [U, "yo"]}, "messages[1]: a message must be an object, found str"),
        ({"messages": [U, {"content": "yo"}]}, "messages[1]: no 'role'; found content"),
        ({"messages": [U, {**A, "role": "asistant"}]}, "unknown role 'asistant'. Did you mean 'assistant'?"),
        ({"messages": [U, {**A, "content": ""}]}, "messages[1].content: empty answer"),
        ({"messages": [U, {**A, "content": 7}]}, "messages[1].content: must be a string, found int"),
        ({"messages": [{**U, "content": [{"type": "image_url"}]}, A]}, "parts of type image_url; only text"),
        ({"messages": [{**U, "train": True}, A]}, "messages[0].train: asks to train a user turn"),
        ({"messages": [U, {**A, "weight": 0.5}]}, "messages[1].weight: must be 0 or 1, found 0.5"),
        ({"messages": [U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}]}, "arguments of 'f'"),
        ({"messages": [U, {**A, "tool_calls": [{"function": {}}]}]}, "a tool call needs a name"),
        ({"messages": [U, A], "tools": "nonsense"}, "tools: not JSON"),
        ({"conversations": [{"from": "humman", "value": "x"}]}, "unknown role 'humman'. Did you mean 'human'?"),
        ({"chosen": "a", "rejected": "a", "prompt": "p"}, "rejected: is the same as chosen"),
        ({"chosen": "a", "rejected": "b"}, "prompt: no shared prompt; found chosen, rejected"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, row: dict[str, Any], cause: str) -> None:
    said = refusal(tmp_path, row)
    assert f"rows.jsonl:1: {cause}" in said or (cause in said and "rows.jsonl:1: " in said)


def test_every_problem_of_every_row_at_once(tmp_path: Path) -> None:
    good = {"instruction": "a", "output": "b"}
    rows = [good, {"instruction": "a"}, good, {"instruction": "a", "output": ""}, "{broken", good]
    with pytest.raises(BadRows) as error:
        parse(tmp_path, *rows)
    # the reader's own problems end the first step; prepare collects over both (tested there)
    assert [(p.line, p.field) for p in error.value.problems] == [(5, "")]
    with pytest.raises(BadRows) as error:
        parse(tmp_path, *rows[:4])
    assert [(p.line, p.field) for p in error.value.problems] == [(2, "output"), (4, "output")]
    assert "rows.jsonl:2: output: missing; found instruction. Fix: add 'output'" in str(error.value)


@pytest.mark.parametrize(("good", "bad"), [("1", "0"), ("TRUE", "FALSE"), ("True", "false"), ("1.0", "0.0")])
def test_verdicts_in_csv_cells(tmp_path: Path, good: str, bad: str) -> None:
    """As prompt/completion rows, the answers that are to be avoided would be learnt."""
    file = tmp_path / "rows.csv"
    file.write_text(f"prompt,completion,label\na,b,{good}\na,c,{bad}\n")
    assert [c.label for c in conversations(read([file]))] == [True, False]


def test_csv_cells_that_hold_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('messages,tools\n"[{""role"":""user"",""content"":""hi""},{""role"":""assistant"",""content"":""yo""}]",\n')
    (conversation,) = conversations(read([file]))
    assert conversation.messages == [U, A]

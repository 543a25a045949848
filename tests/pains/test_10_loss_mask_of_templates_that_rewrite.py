"""Templates that rewrite earlier turns: what is learnt is what the assistant said, found in the one full rendering."""

from __future__ import annotations

import pytest
from situations import chats

from trimtab.data import Conversation, Renderer
from trimtab.errors import DataError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def learnt(template: str, conversation: Conversation, **options: str) -> list[str]:
    tok = chats.tokenizer(template)
    return chats.learnt(Renderer(tok).example(conversation, **options), tok)  # type: ignore[arg-type]


def test_thoughts_of_past_turns_are_gone_and_the_last_are_learnt() -> None:
    talk = chats.talk("u1", "<think>\nt1\n</think>\n\na1", "u2", "<think>\nt2\n</think>\n\na2")
    assert learnt(chats.THOUGHTS, talk) == ["a1<|im_end|>", "<think>\nt2\n</think>\n\na2<|im_end|>"]
    assert learnt(chats.CHATML, talk)[0] == "<think>\nt1\n</think>\n\na1<|im_end|>"  # one that rewrites nothing


def test_calls_are_learnt_and_what_tools_answer_is_not() -> None:
    messages = [
        {"role": "user", "content": "1?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "41"}, {"role": "assistant", "content": "It is 41."},
    ]  # fmt: skip
    said = learnt(chats.TOOLS, Conversation(messages, [TOOL], "rows.jsonl", 1))
    assert len(said) == 2 and '"add"' in said[0] and "41" not in said[0] and said[1] == "It is 41.<|im_end|>"


def test_what_cannot_be_proven_right_is_refused() -> None:
    """A template that writes an answer in capitals: no text in it is the assistant's."""
    capitals = chats.CHATML.replace("m.content", "(m.content | upper)")
    with pytest.raises(DataError) as error:
        learnt(capitals, chats.talk("u", "an answer"))
    assert "rows.jsonl:1" in str(error.value) and "Fix: " in str(error.value)

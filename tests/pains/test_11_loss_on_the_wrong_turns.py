"""For each template and each choice of turns: the learnt text is exactly that of the turns that were chosen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from situations import chats

from trimtab.data import Renderer, check

TURNS = ("first question", "first answer", "second question", "second answer")
NAMES = ["CHATML", "SYSTEM_DEFAULT", "TRIMS_WITH_BOS", "STRICT", "INST", "TOOLS", "GENERATION_TAG", "chatml"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_every_template(name: str, train_on: str) -> None:
    tok = chats.tokenizer(getattr(chats, name, None))
    renderer = Renderer(tok, chat_template=None if hasattr(chats, name) else name)
    talk = chats.talk(*TURNS)
    runs = chats.learnt(renderer.example(talk, train_on=train_on), tok)  # type: ignore[arg-type]
    if train_on == "all":
        assert len(runs) == 1 and all(turn in runs[0] for turn in TURNS)
        return
    want = TURNS[1::2] if train_on == "assistant" else TURNS[3:]
    ends = {renderer.end_of_turn, tok.eos_token, ""}
    assert len(runs) == len(want)
    for run, answer in zip(runs, want, strict=True):
        assert run.strip().startswith(answer) and run.strip()[len(answer) :] in ends


def test_it_is_shown_before_training(tmp_path: Path) -> None:
    file = chats.write(tmp_path / "rows.jsonl", {"prompt": "a question", "completion": "an answer"})
    page = io.StringIO()
    check([file], Renderer(chats.tokenizer()), console=Console(file=page, width=200))
    assert "[[an answer<|im_end|>]]" in page.getvalue()

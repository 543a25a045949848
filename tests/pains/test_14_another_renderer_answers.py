"""The template saved with the tokenizer is the renderer that trained: plain transformers reads the same ids from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from situations import chats
from transformers import AutoTokenizer

from trimtab.data import Renderer
from trimtab.errors import BadCheckpoint
from trimtab.train.talks import CORPUS, check_saved


@pytest.mark.parametrize("name", ["CHATML", "SYSTEM_DEFAULT", "TRIMS_WITH_BOS", "THOUGHTS", "TOOLS", "chatml"])
def test_plain_transformers_sees_the_ids_of_training(name: str, tmp_path: Path) -> None:
    tok = chats.tokenizer(getattr(chats, name, None))
    renderer = Renderer(tok, chat_template=None if hasattr(chats, name) else name)
    tok.chat_template = renderer.chat_template or tok.chat_template
    tok.save_pretrained(tmp_path)
    check_saved(tmp_path, renderer)
    theirs, compared = AutoTokenizer.from_pretrained(tmp_path), 0
    for messages, tools in CORPUS.values():
        if tools is None and messages[-1]["role"] == "assistant":
            asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
            assert asked == renderer.prompt_ids(messages[:-1])
            compared += 1
    assert compared == 9


def test_another_template_in_the_folder_is_found_at_save(tmp_path: Path) -> None:
    tok = chats.tokenizer()
    renderer = Renderer(chats.tokenizer())
    tok.chat_template = tok.chat_template.replace("m.content", "(m.content | trim)")
    tok.save_pretrained(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"do not read conversations as training did: .*space at the edges.* Fix: "):
        check_saved(tmp_path, renderer)

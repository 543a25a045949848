"""A template writes the opening token, and the tokenizer would write it again: there is one, wherever ids are made."""

from __future__ import annotations

import pytest
from situations import chats
from tokenizers import processors

from trimtab.data import Renderer


@pytest.mark.parametrize("name", ["TRIMS_WITH_BOS", "STRICT", "INST"])
def test_there_is_one(name: str) -> None:
    tok = chats.tokenizer(getattr(chats, name))
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tok.bos_token_id)])
    text = tok.apply_chat_template([{"role": "user", "content": "u"}], tokenize=False)
    assert tok(text)["input_ids"].count(tok.bos_token_id) == 2
    renderer = Renderer(tok)
    learnt, asked = renderer.example(chats.talk("u", "a")).input_ids, renderer.prompt_ids([{"role": "user", "content": "u"}])
    assert learnt[0] == asked[0] == tok.bos_token_id
    assert learnt.count(tok.bos_token_id) == asked.count(tok.bos_token_id) == 1
    assert learnt[: len(asked)] == asked

"""A conversation: what is kept, what the base says, where an answer ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # the tiny model is made there

import model_folder as made
import tiny_llama as tiny

from trimtab import LoraConfig, get_peft_model
from trimtab.data import Renderer
from trimtab.errors import ConfigError
from trimtab.serve.chat import Chat


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(made.tokenizer())


@pytest.fixture
def tuned(renderer: Renderer) -> Any:
    base = tiny.llama(vocabulary=len(renderer.tokenizer))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=64, init_lora_weights=False, target_modules="all-linear"))
    return model.eval()


def quiet(_: str) -> None: ...


def greedy(model: Any, renderer: Renderer, messages: list[dict[str, Any]], n: int) -> str:
    """The definition: one token at a time, without a cache."""
    ids = renderer.prompt_ids(messages)
    start = len(ids)
    while len(ids) - start < n:
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(best)
        if best in renderer.stop_token_ids:
            break
    return renderer.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_turns_are_kept_and_forgotten(tuned: Any, renderer: Renderer) -> None:
    chat = Chat(tuned, renderer, system="be brief", max_new_tokens=3)
    first = chat.ask("a", quiet)
    assert first == greedy(tuned, renderer, [chat.opening[0], {"role": "user", "content": "a"}], 3)
    second = chat.ask("b", quiet)
    assert [m["content"] for m in chat.messages] == ["be brief", "a", first, "b", second]
    assert second == greedy(tuned, renderer, chat.messages[:-1], 3)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}]


def test_the_base_answers_and_nothing_is_kept(tuned: Any, renderer: Renderer) -> None:
    chat = Chat(tuned, renderer, max_new_tokens=3)
    chat.ask("a", quiet)
    before = list(chat.messages)
    with tuned.disable_adapter():
        last = greedy(tuned, renderer, before[:1], 3)
        other = greedy(tuned, renderer, [*before, {"role": "user", "content": "b"}], 3)
    assert (chat.base("", quiet), chat.base("b", quiet)) == (last, other)
    assert chat.messages == before


def test_pieces_make_up_the_answer(tuned: Any, renderer: Renderer) -> None:
    pieces: list[str] = []
    answer = Chat(tuned, renderer, max_new_tokens=8).ask("a", pieces.append)
    assert "".join(pieces).strip() == answer


def test_what_cannot_be_answered_is_said(tuned: Any, renderer: Renderer) -> None:
    chat = Chat(tuned, renderer)
    with pytest.raises(ConfigError, match="nothing was asked yet"):
        chat.base("", quiet)
    with pytest.raises(ConfigError, match="/reset begins anew"):
        chat.ask("long " * 100, quiet)
    plain = Chat(tuned.unload(), renderer)
    with pytest.raises(ConfigError, match="no adapter"):
        plain.base("a", quiet)

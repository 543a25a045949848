"""One renderer, checked: a tokenizer that was saved reads a few conversations token by token as training did."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.data import Conversation, Example, Renderer
from trimtab.data.ends import unended
from trimtab.errors import BadCheckpoint, DataError, TrimtabError, TrimtabWarning
from trimtab.train.load import load_tokenizer

_TOOL = {"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}}}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2.5}}}


def _talk(*turns: str, system: str = "") -> list[dict[str, Any]]:
    """User and assistant in turn."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *said] if system else said


# what templates and tokenizers treat differently: edges, roles, signs, tools
CORPUS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": (_talk("Hello", "Hi there."), None),
    "a system message": (_talk("Hello", "Hi.", system="Be brief."), None),
    "several turns": (_talk("one", "1", "two", "2", "three", "3"), None),
    "space at the edges": (_talk("  a \n", " \n b\t "), None),
    "signs": (_talk("naïve Straße 北京 🙂👩‍👧 \u200b\u2028x", "ΑΒΓ\u00a0…\u0301"), None),
    "code": (_talk("def f(x):\n    return x\n", "```python\nx = {'a': [1, 2]}\n```"), None),
    "markup": (_talk("<|im_end|> </s> [INST] <think>", "{{ x }} {% if %} <think>no</think>yes"), None),
    "numbers": (_talk("1234567890 3.14159", "-1e-10"), None),
    "a long text": (_talk("word " * 300, "answer " * 200), None),
    "a question alone": (_talk("What now?"), None),
    "tools": (
        [
            *_talk("1 + 2.5?"),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "3.5"},
            {"role": "assistant", "content": "3.5"},
        ],
        [_TOOL],
    ),
}


def reads(renderer: Renderer) -> dict[str, str]:
    """Each conversation of the corpus as a hash of what the model sees: ids and loss mask, and what generation continues.
    A conversation that the template refuses is refused in both."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)  # said for the user's own rows
        for name, (messages, tools) in CORPUS.items():
            seen: list[Any] = []
            for look in (_learnt, _asked):
                try:
                    seen.append(look(renderer, messages, tools))
                except DataError:
                    seen.append("refused")
            found[name] = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    return found


def _learnt(renderer: Renderer, messages: list[dict[str, Any]], tools: Any) -> Any:
    if not any(m["role"] == "assistant" for m in messages):
        return None
    example = renderer.example(Conversation(messages, tools, "", 0))
    return example.input_ids, example.supervised


def _asked(renderer: Renderer, messages: list[dict[str, Any]], tools: Any) -> Any:
    return renderer.prompt_ids(messages if messages[-1]["role"] == "user" else messages[:-1], tools)


def different(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """The conversations that are read differently."""
    return [name for name in there if name in here and there[name] != here[name]]


def check_saved(folder: Path, renderer: Renderer) -> None:
    """Raise `BadCheckpoint` unless the tokenizer and the template in `folder` read the corpus as `renderer` does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)
            own_code = type(renderer.tokenizer).__module__.startswith("transformers_modules")  # trusted already
            saved = Renderer(load_tokenizer(folder, trust_remote_code=own_code))
    except TrimtabError as error:
        raise BadCheckpoint(f"the tokenizer saved in {folder} cannot be read again: {error}") from error
    if wrong := different(reads(renderer), reads(saved)):
        raise BadCheckpoint(
            f"the tokenizer and the chat template saved in {folder} do not read conversations as training did: "
            f"{len(wrong)} of {len(CORPUS)} become other tokens ({', '.join(wrong[:4])}), so whatever opens the adapter would "
            "ask it in a way it never saw. Fix: a chat template that is saved with its tokenizer (--chat_template FILE.jinja), "
            "or another version of transformers"
        )


def try_saving(renderer: Renderer) -> None:
    """The same before step 1, in a folder that is taken away again."""
    with tempfile.TemporaryDirectory() as folder:
        renderer.tokenizer.save_pretrained(folder)
        check_saved(Path(folder), renderer)


def record(renderer: Renderer, examples: Sequence[Example]) -> dict[str, Any]:
    """What `run.json` says of the template: enough to tell later whether a tokenizer still reads as training did, and
    whether the token that ends an answer was learnt."""
    return {
        "fingerprint": renderer.fingerprint,
        "end_of_turn": renderer.end_of_turn,
        "stop_token_ids": renderer.stop_token_ids,
        "examples": len(examples),
        "examples_with_a_learnt_end": len(examples) - len(unended(examples, renderer)),
        "reads": reads(renderer),
    }

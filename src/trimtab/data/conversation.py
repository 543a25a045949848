"""From rows of any format to conversations in one form.

What is allowed: any number of turns, several user turns in a row, an assistant that speaks first (templates that demand
alternation refuse later, by name), a conversation that ends with the user. What is not: no assistant turn at all, an
empty answer, an unknown role.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.data.formats import FORMATS, near, verdict
from trimtab.data.messages import Message, Place, clean_messages, clean_tools, loads
from trimtab.data.problems import Problems
from trimtab.data.read import Rows


@dataclass
class Conversation:
    """Messages in OpenAI's spelling, and where they came from.

    An assistant's message may carry `train: False`: it is shown, but not learnt. `rejected` is the whole other
    conversation of a preference row (it shares the first `shared` messages); `label` is a KTO row's verdict on the
    answer; `text` is raw text, for which there are no messages.
    """

    messages: list[Message]
    tools: list[Message] | None
    source: str
    line: int
    text: str | None = None
    rejected: list[Message] | None = None
    shared: int = 0
    label: bool | None = None

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last assistant turn: what is given to a model that should answer."""
        return self.messages[: self._last()]

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        return self.messages[self._last()]["content"] if self.messages else ""

    def _last(self) -> int:
        return max((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), default=len(self.messages))


def conversations(rows: Rows, problems: Problems | None = None) -> list[Conversation]:
    """One conversation a row. Raises `DataError` with every problem, unless a collector is given to hold them."""
    collected = problems if problems is not None else Problems()
    out: list[Conversation] = []
    for row in rows:
        if not row.format:
            continue  # reported for the file as a whole
        before = len(collected.found)
        conversation = _READERS[row.format](row.fields, Place(row.source, row.line, collected))
        if conversation is not None and len(collected.found) == before:
            out.append(conversation)
    if problems is None:
        collected.raise_any()
    return out


def _missing(fields: dict[str, Any], column: str, format: str, place: Place) -> None:
    if column in fields:
        place.say(column, "is null", "write a value, or remove the row")
        return
    required, optional = FORMATS[format]
    other = near(column, [name for name in fields if name not in (*required, *optional)])
    fix = f"rename {other!r} to {column!r}" if other else f"add {column!r} ({format} rows need it)"
    place.say(column, f"missing; found {', '.join(fields) or 'nothing'}", fix, f"{column}: missing")


def _text(fields: dict[str, Any], column: str, place: Place) -> str:
    """An optional text column; absent or null is the empty string."""
    value = fields.get(column)
    if value is None or isinstance(value, str):
        return value or ""
    place.say(column, f"must be a string, found {type(value).__name__}", "write it in quotes",
              f"{column}: not a string")
    return ""


def _answer(fields: dict[str, Any], column: str, format: str, place: Place) -> str:
    if fields.get(column) is None:
        _missing(fields, column, format, place)
        return ""
    before = len(place.problems.found)
    text = _text(fields, column, place)
    if not text.strip() and len(place.problems.found) == before:
        place.say(column, "empty answer", "write the answer, or remove the row", "empty answer")
    return text


def _with_system(fields: dict[str, Any], messages: list[Message], place: Place) -> list[Message]:
    system = _text(fields, "system", place)
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _finish(messages: list[Message], fields: dict[str, Any], place: Place, field: str) -> Conversation:
    if messages and not any(m["role"] == "assistant" for m in messages):
        place.say(field, "no assistant turn: nothing to learn", "add the assistant's answer, or remove the row",
                  "no assistant turn")
    return Conversation(messages, clean_tools(fields.get("tools"), place), place.source, place.line)


def _instruction(fields: dict[str, Any], place: Place) -> str:
    parts = (_text(fields, "instruction", place), _text(fields, "input", place))
    return "\n".join(part for part in parts if part)


def _alpaca(fields: dict[str, Any], place: Place) -> Conversation:
    messages: list[Message] = []
    history = loads(fields.get("history"), place, "history") or []
    pairs = history if isinstance(history, list) else [history]
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(side, str) for side in pair)):
            place.say(f"history[{i}]", "must be a pair of strings", 'write ["what the user said", "the answer"]',
                      "history that is not pairs")
            continue
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = _instruction(fields, place)
    if not asked.strip():
        place.say("instruction", "instruction and input are both empty", "write what was asked, or remove the row",
                  "empty instruction and input")
    messages.append({"role": "user", "content": asked})
    messages.append({"role": "assistant", "content": _answer(fields, "output", "alpaca", place)})
    return Conversation(_with_system(fields, messages, place), None, place.source, place.line)


def _messages(fields: dict[str, Any], place: Place) -> Conversation | None:
    if fields.get("messages") is None:
        return _missing(fields, "messages", "messages", place)
    return _finish(clean_messages(fields["messages"], place, "messages"), fields, place, "messages")


def _sharegpt(fields: dict[str, Any], place: Place) -> Conversation | None:
    if fields.get("conversations") is None:
        return _missing(fields, "conversations", "sharegpt", place)
    messages = clean_messages(fields["conversations"], place, "conversations")
    return _finish(_with_system(fields, messages, place), fields, place, "conversations")


def _side(fields: dict[str, Any], column: str, role: str, format: str, place: Place) -> list[Message]:
    """A column that is a string, a message or a list of messages."""
    value = fields.get(column)
    if isinstance(value, (list, dict)):
        return clean_messages(value, place, column)
    if role == "assistant":
        return [{"role": role, "content": _answer(fields, column, format, place)}]
    if value is None:
        _missing(fields, column, format, place)
        return []
    return [{"role": role, "content": _text(fields, column, place)}]


def _prompt_completion(fields: dict[str, Any], place: Place) -> Conversation:
    messages = _side(fields, "prompt", "user", "prompt/completion", place)
    messages = messages + _side(fields, "completion", "assistant", "prompt/completion", place)
    return _finish(_with_system(fields, messages, place), fields, place, "completion")


def _preference(fields: dict[str, Any], place: Place) -> Conversation:
    """Chosen and rejected as two conversations over one prompt; lists may repeat the prompt."""
    column = next((c for c in ("conversations", "messages") if fields.get(c) is not None), "prompt")
    if column != "prompt":
        prompt = clean_messages(fields[column], place, column)
    elif fields.get("prompt") is not None:
        prompt = _side(fields, "prompt", "user", "preference", place)
    else:
        asked = _instruction(fields, place)
        prompt = [{"role": "user", "content": asked}] if asked else []
    prompt = _with_system(fields, prompt, place)
    chosen, rejected = (_side(fields, c, "assistant", "preference", place) for c in ("chosen", "rejected"))
    if prompt and chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    chosen, rejected = prompt + chosen, prompt + rejected
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(rejected))
    if chosen and chosen == rejected:
        place.say("rejected", "is the same as chosen", "remove the row: it prefers nothing", "chosen equals rejected")
    elif shared == 0 and chosen and rejected:
        place.say("prompt", f"no shared prompt; found {', '.join(fields)}", "add 'prompt', or begin both lists with it",
                  "a preference without a prompt")
    conversation = _finish(chosen, fields, place, "chosen")
    conversation.rejected, conversation.shared = rejected, shared
    return conversation


def _kto(fields: dict[str, Any], place: Place) -> Conversation | None:
    if fields.get("label") is None:
        return _missing(fields, "label", "kto", place)
    if fields.get("messages") is not None:
        conversation = _messages(fields, place)
    elif fields.get("conversations") is not None:
        conversation = _sharegpt(fields, place)
    else:
        conversation = _prompt_completion(fields, place)
    if conversation is not None:
        conversation.label = verdict(fields["label"])
    return conversation


def _raw(fields: dict[str, Any], place: Place) -> Conversation:
    text = _answer(fields, "text", "text", place)
    return Conversation([], None, place.source, place.line, text=text)


_READERS: dict[str, Callable[[dict[str, Any], Place], Conversation | None]] = {
    "alpaca": _alpaca, "messages": _messages, "sharegpt": _sharegpt, "prompt/completion": _prompt_completion,
    "preference": _preference, "kto": _kto, "text": _raw,
}

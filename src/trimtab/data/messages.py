"""One spelling for messages, whatever the row's: OpenAI's `role` and `content`, tool arguments as objects."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trimtab.data.problems import Problems
from trimtab.data.read import broken_text
from trimtab.errors import nearest

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "function_call": "function_call", "tool": "tool", "observation": "tool",
    "function": "tool", "function_response": "tool",
}
_OPENAI = ("system", "user", "assistant", "tool")
_SHAREGPT = ("system", "human", "gpt", "function_call", "observation")


@dataclass
class Place:
    """Where a row stands; what is said about it lands in the collector with file and line."""

    source: str
    line: int
    problems: Problems

    def say(self, field: str, cause: str, fix: str, kind: str = "") -> None:
        self.problems.add(self.source, self.line, field, cause, fix, kind)


def loads(value: Any, place: Place, field: str) -> Any:
    """A list or object that may stand in the row as a JSON string (CSV cells, `tools` columns)."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        read = json.loads(value)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {str(error)[:200]}"
        place.say(field, why, "write a list, or the same list as a JSON string", f"{field}: not JSON")
        return None
    if broken_text(read, value):
        place.say(field, "half of a surrogate pair, which is no character", "write the whole character, or take it out")
        return None
    return read


def clean_messages(value: Any, place: Place, field: str) -> list[Message]:
    """The messages of one column in OpenAI's spelling; those that cannot be read are reported and left out."""
    value = loads(value, place, field)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        place.say(field, f"must be a list of messages, found {found}", 'write [{"role": "user", "content": ...}, ...]',
                  f"{field}: not a list of messages")
        return []
    cleaned = [_message(message, place, f"{field}[{i}]") for i, message in enumerate(value)]
    return [message for message in cleaned if message is not None]


def _message(message: Any, place: Place, field: str) -> Message | None:
    if not isinstance(message, dict):
        place.say(field, f"a message must be an object, found {type(message).__name__}",
                  'write {"role": ..., "content": ...}', "a message that is not an object")
        return None
    sharegpt = "from" in message and "role" not in message
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    said = message.get(role_key)
    if said is None:
        place.say(field, f"no {role_key!r}; found {', '.join(message) or 'nothing'}",
                  f'add "{role_key}": one of {", ".join(_SHAREGPT if sharegpt else _OPENAI)}',
                  "a message without a role")
        return None
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        place.say(f"{field}.{role_key}", f"unknown role {said!r}.{nearest(str(said), ROLES)}".rstrip("."),
                  f"use one of {', '.join(_SHAREGPT if sharegpt else _OPENAI)}", f"unknown role {said!r}")
        return None
    content = _content(message.get(text_key), place, f"{field}.{text_key}")
    if content is None:
        return None
    if role == "function_call":
        calls = _calls(content, place, f"{field}.{text_key}")
        return {"role": "assistant", "content": "", "tool_calls": calls} if calls else None
    rest = {k: v for k, v in message.items() if k not in (role_key, text_key, "tool_calls") and v is not None}
    out: Message = {"role": role, "content": content, **rest}
    if not _flag(out, place, field):
        return None
    if calls := message.get("tool_calls"):
        if role != "assistant":
            place.say(f"{field}.tool_calls", f"tool calls in a {role} message", "only the assistant calls tools")
            return None
        out["tool_calls"] = _calls(calls, place, f"{field}.tool_calls")
    elif role == "assistant" and not content.strip() and out.get("train", True):
        place.say(f"{field}.{text_key}", "empty answer", "write the answer, or remove the row", "empty answer")
    return out


def _content(value: Any, place: Place, field: str) -> str | None:
    """A string; a list of text parts is joined. Null is the empty string: assistants that call tools write it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        kinds = [part.get("type", "text") if isinstance(part, dict) else type(part).__name__ for part in value]
        if all(kind == "text" and isinstance(part.get("text"), str) for kind, part in zip(kinds, value, strict=True)):
            return "".join(part["text"] for part in value)
        other = sorted({str(kind) for kind in kinds if kind != "text"}) or ["text without a text"]
        place.say(field, f"parts of type {', '.join(other)}; only text can be trained", "leave these rows out",
                  "content parts that are not text")
        return None
    place.say(field, f"must be a string, found {type(value).__name__}", "write it in quotes", "content is not a string")
    return None


def _flag(message: Message, place: Place, field: str) -> bool:
    """`train: true|false` or OpenAI's `weight: 0|1` become one `train` flag, for an assistant's turn only."""
    for key in ("train", "weight"):
        if key not in message:
            continue
        value = message.pop(key)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            place.say(f"{field}.{key}", f"must be {'true or false' if key == 'train' else '0 or 1'}, found {value!r}",
                      "whole turns are trained or not; weights between are not supported", f"a bad {key!r} flag")
            return False
        if value and message["role"] != "assistant":
            place.say(f"{field}.{key}", f"asks to train a {message['role']} turn",
                      "use train_on: all, or drop the flag",
                      f"{key!r} on a turn that is not the assistant's")
            return False
        message["train"] = bool(value)
    return True


def _calls(value: Any, place: Place, field: str) -> list[Message]:
    """Tool calls as `{"type": "function", "function": {"name", "arguments": {...}}}`, from either form."""
    value = loads(value, place, field)
    out: list[Message] = []
    for call in value if isinstance(value, list) else [value]:
        if call is None:
            return []  # reported by `loads`
        inner = call.get("function", call) if isinstance(call, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or not isinstance(name, str) or not name:
            place.say(field, "a tool call needs a name", 'write {"name": ..., "arguments": {...}}', "a bad tool call")
            return []
        arguments = inner.get("arguments", inner.get("parameters")) or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                pass  # reported below as a string
        if not isinstance(arguments, dict):
            place.say(field, f"arguments of {name!r} must be an object or its JSON, found {str(arguments)[:40]!r}",
                      'write "arguments": {...}', "tool call arguments that are not an object")
            return []
        extra = {"id": call["id"]} if call.get("id") else {}
        out.append({"type": "function", **extra, "function": {"name": name, "arguments": arguments}})
    return out


def clean_tools(value: Any, place: Place) -> list[Message] | None:
    """The `tools` column as OpenAI function schemas; an empty list is no tools."""
    value = loads(value, place, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        place.say("tools", "must be a list of tool descriptions", 'write [{"name": ..., "parameters": {...}}]')
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]

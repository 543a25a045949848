"""Where a chat template puts each assistant turn, found without searching for text.

A template is a function from messages to a string. Replace the content of message i by a marker and render again: what
stands before the marker (P) and behind it (S) does not depend on content i. If the true rendering T ends with S,
content i ends at len(T) - len(S), whatever the contents say: an answer that quotes its own prompt or a role marker
cannot mislead. Two forms of this are used:

- the *frame* of a shape (sequence of roles): all contents replaced at once, rendered once for all rows of the shape. If
  T equals the frame with the contents put in, every position is known by counting. This is nearly every row.
- one message at a time, for rows whose contents change the rendering: thoughts cut from past turns, tool calls.

A turn begins where the generation prompt ends, so text that the template itself opens an answer with (an empty thought)
is learnt: the model has to write it. It ends with the token that closes it; whatever the template writes after that
(a newline, the next header) is not learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trimtab.data.messages import Message

Render = Callable[[list[Message], "list[Message] | None", bool], str]
Span = tuple[int, int]
_PLAIN = frozenset(("role", "content"))
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_text")


class TemplateRefused(Exception):
    """The template raised, or its rendering cannot be resolved into turns; the message says which and why."""


@dataclass(frozen=True)
class Turn:
    """The characters of one assistant turn, and of the prompt content that stands right before it."""

    message: int
    span: Span
    prompt: Span


@dataclass(frozen=True)
class _Frame:
    """The fixed text of a shape: `pieces[k]` stands before the content of message `order[k]`; the last ends it."""

    order: list[int]
    pieces: list[str]
    lead: dict[int, int]  # message -> characters at the end of the piece before it that the assistant has to write
    close: dict[int, int]  # message -> characters at the begin of the piece behind it that end the turn


@dataclass
class Layout:
    """The turns of one template. `tokens` are the added tokens of the tokenizer: one of them closes a turn, or none."""

    render: Render
    tokens: Sequence[str]
    end_of_turn: str | None = None
    split_header: bool = False  # met: a generation prompt that is not what stands before an answer
    unclosed: bool = False  # met: an answer that is not closed, though the template can close answers
    _closers: set[str] = field(default_factory=set)
    _frames: dict[tuple[str, ...], _Frame | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = [token for token in self.tokens if token.strip()]
        user, answer = ({"role": r, "content": _marker(i)} for i, r in enumerate(("user", "assistant")))
        try:
            tail = self.render([user, answer], None, False).rpartition(answer["content"])[2]
            head, opened = self.render([user], None, False), self.render([user], None, True)
        except TemplateRefused:
            return  # each row will say why
        first = self._first(tail, self.tokens)
        if first is not None:
            self.end_of_turn = first[1]
            self._closers = {first[1]}
            after_user = head.rpartition(user["content"])[2]
            if opened.startswith(head) and len(opened) > len(head):
                # some templates close a turn that is not the last as they close the user's
                self._closers |= {token for token in self.tokens if token in after_user}

    def turns(self, messages: list[Message], tools: list[Message] | None, text: str) -> list[Turn]:
        """Every assistant turn of `text`, the rendering of `messages`. Raises `TemplateRefused` if one is unsure."""
        if all(message.keys() == _PLAIN for message in messages):
            frame = self._frame(messages, tools)
            if frame is not None and (turns := _count(frame, messages, text)) is not None:
                return turns
        return [
            self._turn(i, messages, tools, text) for i, message in enumerate(messages) if message["role"] == "assistant"
        ]

    # all at once

    def _frame(self, messages: list[Message], tools: list[Message] | None) -> _Frame | None:
        if tools:
            return self._make_frame(messages, tools)
        shape = tuple(message["role"] for message in messages)
        if shape not in self._frames:
            self._frames[shape] = self._make_frame(messages, None)
        return self._frames[shape]

    def _make_frame(self, messages: list[Message], tools: list[Message] | None) -> _Frame | None:
        marked = [{"role": message["role"], "content": _marker(i)} for i, message in enumerate(messages)]
        markers = [message["content"] for message in marked]
        try:
            text = self.render(marked, tools, False)
        except TemplateRefused:
            return None
        if any(text.count(marker) != 1 for marker in markers):
            return None
        order = sorted(range(len(markers)), key=lambda i: text.index(markers[i]))  # systems move in some templates
        pieces = []
        for i in order:
            piece, _, text = text.partition(markers[i])
            pieces.append(piece)
        pieces.append(text)
        lead, close = {}, {}
        for k, i in enumerate(order):
            if messages[i]["role"] == "assistant":
                header = self._header(marked[:i], tools, markers[order[k - 1]]) if k and i else None
                lead[i] = self._lead(pieces[k], header)
                close[i] = self._close(pieces[k + 1])
        return _Frame(order, pieces, lead, close)

    def _header(self, before: list[Message], tools: list[Message] | None, marker: str) -> str | None:
        """What stands between the content before an answer and the place where the model begins to write."""
        try:
            _, found, header = self.render(before, tools, True).rpartition(marker)
        except TemplateRefused:
            return None
        return header if found else None

    def _lead(self, piece: str, header: str | None) -> int:
        if header is not None and piece.startswith(header):
            return len(piece) - len(header)
        self.split_header = self.split_header or header is not None
        return 0

    def _close(self, piece: str, last: bool = False) -> int:
        """Characters of `piece` up to and with the token that closes the turn; 0 when nothing closes it."""
        found = self._first(piece, self._closers, last)
        self.unclosed = self.unclosed or (found is None and bool(self._closers))
        return found[0] + len(found[1]) if found else 0

    @staticmethod
    def _first(text: str, tokens: Sequence[str] | set[str], last: bool = False) -> tuple[int, str] | None:
        places = [((text.rfind if last else text.find)(token), token) for token in tokens if token in text]
        # at one place the longer token is the one the tokenizer sees
        return (max if last else min)(places, key=lambda p: (p[0], -len(p[1]))) if places else None

    # one at a time

    def _turn(self, i: int, messages: list[Message], tools: list[Message] | None, text: str) -> Turn:
        """Its tool calls dropped, then kept: templates may refuse a tool's answer without its call."""
        for keep in (False, True) if messages[i].get("tool_calls") else (False,):
            around = self._around(i, messages, tools, keep)
            if around is None:
                continue
            before, behind = around
            if not text.endswith(behind):
                continue
            begin = self._begin(i, messages, tools, text, before)
            if begin is None:
                continue
            end = len(text) - len(behind) + self._close(self._between(i, messages, tools, keep, behind), last=keep)
            start, prompt = begin
            if end >= start:
                self._check(messages[i], i, text[start:end])
                return Turn(i, (start, end), prompt)
        raise TemplateRefused(f"the place of message {i} cannot be proven: the template renders it, or what is "
                              "around it, differently depending on its content")

    def _around(
        self, i: int, messages: list[Message], tools: list[Message] | None, keep: bool
    ) -> tuple[str, str] | None:
        """What the template writes before and behind content i."""
        marked = [*messages[:i], _mark(messages[i], i, keep), *messages[i + 1 :]]
        try:
            before, found, behind = self.render(marked, tools, False).partition(_marker(i))
        except TemplateRefused:
            return None
        return (before, behind) if found and _marker(i) not in behind else None

    def _begin(
        self, i: int, messages: list[Message], tools: list[Message] | None, text: str, before: str
    ) -> tuple[int, Span] | None:
        """Where turn i begins, and the span of the content before it."""
        prompt = (0, 0)
        if i and (around := self._around(i - 1, messages, tools, True)):
            previous, rest = around
            if text.endswith(rest):
                at = len(text) - len(rest)
                prompt = (len(previous), at) if text.startswith(previous) and len(previous) <= at else (at, at)
                header = self._header([*messages[: i - 1], _mark(messages[i - 1], i - 1, True)], tools, _marker(i - 1))
                if header is not None and text.startswith(header, at):
                    start = at + len(header)
                    if before.startswith(text[:start]):
                        return start, prompt
                self.split_header = self.split_header or header is not None
        return (len(before), prompt) if text.startswith(before) else None

    def _between(
        self, i: int, messages: list[Message], tools: list[Message] | None, keep: bool, behind: str
    ) -> str:
        """The fixed text between content i and the next, so that no token of a later content closes this turn."""
        if i + 1 == len(messages):
            return behind
        marked = [*messages[:i], _mark(messages[i], i, keep), _mark(messages[i + 1], i + 1, True), *messages[i + 2 :]]
        try:
            rest = self.render(marked, tools, False).partition(_marker(i))[2]
        except TemplateRefused:
            return ""
        piece, found, _ = rest.partition(_marker(i + 1))
        return piece if found else ""

    @staticmethod
    def _check(message: Message, i: int, said: str) -> None:
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in said:
                raise TemplateRefused(f"the template does not render the tool calls of message {i}")
        if message["content"].strip() and not said.strip():
            raise TemplateRefused(f"the template does not render the content of message {i}")


def _marker(i: int) -> str:
    # letters and digits only, so that no template trims, escapes or splits it; no text holds it by chance
    return f"zq7Kx3marker{i}Vq9wJz"


def _mark(message: Message, i: int, keep: bool) -> Message:
    dropped = _THOUGHTS if keep else (*_THOUGHTS, "tool_calls")
    return {**{k: v for k, v in message.items() if k not in dropped}, "content": _marker(i)}


def _count(frame: _Frame, messages: list[Message], text: str) -> list[Turn] | None:
    """The turns by counting, if the text is the frame with the contents put in, as they are or trimmed; else None."""
    contents = [message["content"] for message in messages]
    for filled in (contents, [content.strip() for content in contents]):
        parts = [frame.pieces[0]]
        for k, i in enumerate(frame.order):
            parts += (filled[i], frame.pieces[k + 1])
        if "".join(parts) == text:
            break
    else:
        return None
    turns, at, prompt = [], 0, (0, 0)
    for k, i in enumerate(frame.order):
        at += len(frame.pieces[k])
        end = at + len(filled[i])
        if messages[i]["role"] == "assistant":
            turns.append(Turn(i, (at - frame.lead[i], end + frame.close[i]), prompt))
        prompt = (at, end)
        at = end
    return sorted(turns, key=lambda turn: turn.message)

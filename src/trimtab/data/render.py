"""The one renderer: what a conversation looks like to the model, in training, evaluation, chat and serving alike."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from jinja2.exceptions import SecurityError

from trimtab.data import sandbox
from trimtab.data.conversation import Conversation
from trimtab.data.encode import Encoded, Encoder, Example, Rendering
from trimtab.data.layout import Layout, TemplateRefused
from trimtab.data.messages import Message
from trimtab.data.problems import Problem, Problems
from trimtab.data.templates import BUILT_IN, CHATGLM, CHATML, close_with
from trimtab.errors import ConfigError, DataError, TrimtabWarning

TrainOn = Literal["assistant", "last", "all"]
TRAIN_ON = ("assistant", "last", "all")
_NOT_FOR_TEMPLATES = ("train",)


class Renderer:
    """A tokenizer and its chat template.

    `chat_template`: Jinja text, a file of it, or "chatml" / "chatglm"; by default the tokenizer's own, and where it has
    none ChatML (ChatGLM's layout for ChatGLM tokenizers). What had to be decided is said once, as a `TrimtabWarning`,
    and kept in `notices`.

    Opening tokens: a template writes all of them (as in `tokenizer.apply_chat_template` and every serving engine), so
    nothing is added to its text; our own layouts write what the tokenizer opens any text with. Raw text gets it, too.
    Closing token: the added token that the template writes behind an answer (`end_of_turn`). Where it writes none, the
    eos token is put behind the last answer of an example, since a model must learn to stop.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.notices: list[str] = []
        self.chat_template, self._own = self._choose(chat_template)
        sandbox.check(self.chat_template or getattr(tokenizer, "chat_template", None))
        self._encoder = Encoder(tokenizer)
        self._open()
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._layout = Layout(self._render, sorted({*added, *tokenizer.all_special_tokens}))
        self._tools_ignored: dict[str, bool] = {}
        if self.end_of_turn is None:
            if tokenizer.eos_token_id is None:
                raise DataError("neither the chat template nor the tokenizer has a token that ends a turn. "
                                "Fix: set tokenizer.eos_token, or pass a chat_template that closes its turns")
            self.notice(f"the chat template closes no turn: {tokenizer.eos_token} is put behind the last answer")
        self._encoder.seam = self._has_seam()

    # what it shows

    @property
    def end_of_turn(self) -> str | None:
        """The token that closes an assistant's turn, or None when the template writes none."""
        return self._layout.end_of_turn

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids at which an answer is complete."""
        ids = [self.tokenizer.convert_tokens_to_ids(self.end_of_turn)] if self.end_of_turn else []
        return list(dict.fromkeys(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None))

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids: vocabulary, merges, special tokens, template."""
        tokenizer = self.tokenizer
        content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(
            [sorted(tokenizer.get_vocab().items()), [str(t) for t in tokenizer.added_tokens_decoder.values()]])
        parts = (type(tokenizer).__name__, content, str(tokenizer.special_tokens_map),
                 str(self.chat_template or tokenizer.chat_template))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def text(
        self, messages: list[Message], tools: list[Message] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the model reads it. Raises `DataError` with the template's own words if it refuses."""
        try:
            return self._render(_shown(messages), tools, add_generation_prompt)
        except TemplateRefused as refused:
            raise DataError(f"the conversation cannot be rendered: {refused}") from refused

    def prompt_ids(self, messages: list[Message], tools: list[Message] | None = None) -> list[int]:
        """Token ids of the conversation and the opening of the assistant's turn: what `generate` continues."""
        ids = self._encoder.ids(self.text(messages, tools, add_generation_prompt=True))
        prefix = self._encoder.prefix if self._own else []
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def example(self, conversation: Conversation, train_on: TrainOn = "assistant") -> Example:
        """Ids and loss mask of one conversation. Raises `DataError` when the mask cannot be proven right."""
        problems = Problems()
        found = self.examples([conversation], train_on, problems)
        problems.raise_any()
        return found[0]

    def examples(
        self, conversations: Iterable[Conversation], train_on: TrainOn, problems: Problems, batch: int = 2048
    ) -> list[Example]:
        """Examples of many conversations, tokenised in bulk; those that cannot be proven are left out and reported."""
        if train_on not in TRAIN_ON:
            raise ConfigError(f"train_on: {train_on!r} is not one of {', '.join(TRAIN_ON)}")
        out: list[Example] = []
        pending: list[tuple[Conversation, Rendering]] = []

        def flush() -> None:
            encoded = self._encoder.encode([rendering for _, rendering in pending])
            for (conversation, _), found in zip(pending, encoded, strict=True):
                out.extend(_example(conversation, found, problems))
            pending.clear()

        for conversation in conversations:
            try:
                pending.append((conversation, self._rendering(conversation, train_on)))
            except TemplateRefused as refused:
                problems.found.append(_refused(conversation, str(refused)))
            if len(pending) == batch:
                flush()
        flush()
        return out

    # how it does it

    def _choose(self, given: str | Path | None) -> tuple[str | None, bool]:
        """The template to use (None: the tokenizer's own), and whether it is one of ours."""
        tokenizer = self.tokenizer
        if isinstance(given, Path) or (given and given.endswith(".jinja")):
            if not Path(given).is_file():
                raise ConfigError(f"chat_template: there is no file {str(given)!r}")
            return Path(given).read_text(encoding="utf-8"), False
        if given and given not in BUILT_IN:
            if "{" not in given:
                raise ConfigError(f"chat_template: {given!r} is neither Jinja text, a .jinja file, nor one of "
                                  f"{', '.join(BUILT_IN)}. Left out, it is the tokenizer's own")
            return given, False
        if given is None and tokenizer.chat_template:
            return None, False
        chatglm = given == "chatglm" or (given is None and type(tokenizer).__name__.startswith("ChatGLM"))
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if not chatglm and end is None:
            raise DataError("the tokenizer has no chat template and no eos token. Fix: set tokenizer.eos_token, or "
                            "pass a chat_template")
        if given is None:
            name = "ChatGLM's <|system|> <|user|> <|assistant|>" if chatglm else f"ChatML, closed by {end}"
            self.notice(f"the tokenizer has no chat template; {name} is used")
        return (CHATGLM if chatglm else close_with(CHATML, end)), True

    def _open(self) -> None:
        """Let a layout of ours write the opening tokens itself: saved with an adapter, it is then read as in training."""
        prefix = self._encoder.prefix
        opening = self._encoder.decode(prefix) if self._own and prefix else ""
        if opening and self._encoder.ids(opening) == prefix:
            self.chat_template, self._own = f"{{{{- {json.dumps(opening)} }}}}{self.chat_template}", False

    def notice(self, line: str) -> None:
        """Say one line once, and keep it."""
        if line not in self.notices:
            self.notices.append(line)
            warnings.warn(line, TrimtabWarning)

    def _render(self, messages: list[Message], tools: list[Message] | None, opened: bool) -> str:
        try:
            return sandbox.render(self.tokenizer, messages, tools, self.chat_template, opened)
        except SecurityError as error:  # at once, for every row would take as long
            fix = "another chat_template (--chat_template chatml)"
            raise DataError(f"the chat template was stopped: {error}. Fix: {fix}") from None
        except Exception as error:  # a template is a program of somebody else's: it may raise anything
            raise TemplateRefused(f"the chat template refuses it: {error or type(error).__name__}") from error

    def _rendering(self, conversation: Conversation, train_on: TrainOn) -> Rendering:
        if conversation.text is not None:
            text = conversation.text
            return Rendering(text, ((0, len(text)),), bos=True, eos=self.tokenizer.eos_token_id is not None, whole=True)
        messages = _shown(conversation.messages)
        text = self._render(messages, conversation.tools, False)
        turns = self._layout.turns(messages, conversation.tools, text)
        if self._layout.split_header:
            self.notice("the template's generation prompt is not what it writes before answers in a finished "
                         "conversation: only the answers themselves are learnt")
        if self._layout.unclosed:
            self.notice(f"some answers are not closed by {self.end_of_turn} in this template, and learnt without it")
        if conversation.tools:
            self._check_tools(messages, conversation.tools, text)
        learnt = turns[-1:] if train_on == "last" else turns
        learnt = [turn for turn in learnt if conversation.messages[turn.message].get("train", True)]
        ends_open = messages[-1]["role"] == "assistant" and conversation.messages[-1].get("train", True)
        return Rendering(
            text, tuple(turn.span for turn in learnt), prompt=turns[0].prompt if turns else (0, 0), bos=self._own,
            eos=self.end_of_turn is None and ends_open, whole=train_on == "all")

    def _check_tools(self, messages: list[Message], tools: list[Message], text: str) -> None:
        """A template without tools renders the row as if it had none: the model never sees what it may call."""
        key = "".join(message["role"][0] for message in messages)
        if key not in self._tools_ignored:
            try:
                self._tools_ignored[key] = self._render(messages, None, False) == text
            except TemplateRefused:
                self._tools_ignored[key] = False
        if self._tools_ignored[key]:
            self.notice("the chat template ignores the tools of the rows; --chat_template chatml shows them")

    def _has_seam(self) -> bool:
        """Whether text in one go is cut differently, before an answer, from the prompt alone that generation sees."""
        asked = [{"role": "user", "content": "Hi"}]
        try:
            text = self._render([*asked, {"role": "assistant", "content": "Yes"}], None, False)
            head = self._render(asked, None, True)
        except TemplateRefused:
            return False
        alone = self._encoder.ids(head)
        return text.startswith(head) and self._encoder.ids(text)[: len(alone)] != alone


def _shown(messages: list[Message]) -> list[Message]:
    """The messages without what is only for us."""
    return [{k: v for k, v in m.items() if k not in _NOT_FOR_TEMPLATES} if "train" in m else m for m in messages]


def _example(conversation: Conversation, found: Encoded | str, problems: Problems) -> list[Example]:
    if isinstance(found, str):
        problems.found.append(_refused(conversation, found))
        return []
    ids, mask, prompt = found
    return [Example(ids, mask, conversation.source, conversation.line, prompt)]


def _refused(conversation: Conversation, cause: str) -> Problem:
    fix = "change the row, or choose another chat_template (--chat_template chatml)"
    return Problem(conversation.source, conversation.line, "", cause, fix, re.sub(r"\d+", "N", cause)[:110])

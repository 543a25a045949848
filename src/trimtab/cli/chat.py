"""`trimtab chat`: talk to an adapter, at a terminal or through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import screen
from trimtab.errors import ConfigError, TrimtabError, nearest

if TYPE_CHECKING:
    from trimtab.serve.chat import Chat

COMMANDS = """\
/base           the untuned model answers the last question again; nothing of it is kept
/base QUESTION  ... or another question
/reset          forget the conversation
/exit           leave (so does Ctrl-D); Ctrl-C stops an answer"""
_WORDS = ("/base", "/reset", "/exit", "/quit", "/help")


def chat(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="an adapter folder, or a plain model's")],
    model: Annotated[str | None, typer.Option("--model", help="the base model, if it has moved")] = None,
    system: Annotated[str | None, typer.Option("--system", help="a system message to begin with")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="longest answer in tokens")] = 256,
    allow_pickle: Annotated[bool, typer.Option("--allow_pickle", help="read adapter_model.bin (pickle can run code)")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest answer; more: chance")] = 0.0,
) -> None:
    """Talk to an adapter.

    Commands in the talk: /base, /reset, /exit; /help explains them. From a pipe, each line is a question."""
    from trimtab.serve.chat import open_chat

    settings = {"system": system, "max_new_tokens": max_new_tokens, "temperature": temperature}
    talk = open_chat(adapter, model=model, allow_pickle=allow_pickle, **settings)
    piped = not sys.stdin.isatty()
    if not piped:
        screen.say(f"{adapter}: ask something; /help shows the commands", style="dim")
    for line in _lines(piped):
        if line in ("/exit", "/quit"):
            break
        if line:
            _turn(talk, line, strict=piped)


def _lines(piped: bool) -> Iterator[str]:
    if piped:
        for stream in (sys.stdin, sys.stdout):  # not the locale's encoding, which is another on Windows
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8")
        try:
            yield from (line.strip() for line in sys.stdin)
        except UnicodeDecodeError as problem:
            raise ConfigError(f"the questions are not UTF-8: {problem}") from None
        return
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


def _turn(talk: Chat, line: str, *, strict: bool) -> None:
    """One line of the user's. At a terminal a mistake is said and the talk goes on; in a pipe it ends the command."""
    command, _, rest = line.partition(" ")
    try:
        if command == "/reset":
            talk.reset()
        elif command == "/help":
            print(COMMANDS)
        elif command == "/base":
            talk.base(rest.strip(), _show)
            print(flush=True)
        elif line.startswith("/") and line[1:].isalpha():
            raise ConfigError(f"no command {line}.{nearest(line, _WORDS)} All of them: /help")
        else:
            talk.ask(line, _show)
            print(flush=True)
    except TrimtabError as problem:
        if strict:
            raise
        screen.error(str(problem))
    except KeyboardInterrupt:
        if strict:
            raise
        print(" (stopped)")


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()

"""`trimtab doctor`: why a tuned model answers like its base, babbles, or never stops."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.cli import screen

FOUND = 1
_STYLES = {"well": "green", "cause": "bold red", "unknown": "dim"}


def doctor(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="the adapter folder")],
    model: Annotated[str | None, typer.Option("--model", help="the base model, if it has moved")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow_pickle", help="read adapter_model.bin (pickle can run code)")] = False,
) -> None:
    """Why does my tuned model answer like the base, babble, or never stop?

    Exit code 0: healthy; 1: a cause was found; 2: the adapter could not be examined."""
    from trimtab.doctor import examine

    out = screen.console()
    report = examine(adapter, model=model, allow_pickle=allow_pickle)
    for name, text in (("adapter", report.adapter), ("base", report.base)):
        out.print(Text.assemble((f"{name:<10}", "bold"), text), soft_wrap=True)
    out.print()
    for one in report.findings:
        head = Text.assemble((f"{one.state:<9}", _STYLES[one.state]), (f"{one.check:<10}", "bold"))
        out.print(head + Text(one.seen, "" if one.state != "unknown" else "dim"), soft_wrap=True)
    out.print()
    cause = report.cause
    if cause is None:
        out.print(Text.assemble(("healthy   ", "bold green"), "none of the known causes is there"), soft_wrap=True)
        return
    out.print(Text.assemble(("cause     ", "bold red"), f"{cause.check}: {cause.seen}"), soft_wrap=True)
    out.print(Text.assemble(("fix       ", "bold"), cause.fix), soft_wrap=True)
    raise typer.Exit(FOUND)

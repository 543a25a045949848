"""`trimtab merge`: an adapter and its base as one plain model, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.cli import screen


def merge(
    adapter: Annotated[Path, typer.Argument(help="the adapter folder", show_default=False)],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="the merged model's folder", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", help="the base, if it is not where the adapter says")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow_pickle", help="read adapter_model.bin, if you trust it")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as the run computed), bfloat16, float16 or float32")] = "auto",
) -> None:
    """Make adapter and base one plain model; the two are compared on probe prompts."""
    from trimtab.export.merge import merge as merged

    out = screen.console()
    merged(adapter, output_dir, model=model, dtype=dtype, allow_pickle=allow_pickle, console=out)
    out.print(Text.assemble(("talk to it  ", "dim"), (f"trimtab chat {output_dir}", "cyan")), soft_wrap=True)

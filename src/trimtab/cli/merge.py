"""`trimtab merge`: an adapter and its base as one plain model, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.cli import screen


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="the adapter folder")],
    output_dir: Annotated[Path, typer.Option("--output_dir", metavar="FOLDER", help="the merged model's folder")],
    model: Annotated[str | None, typer.Option("--model", help="the base model, if it has moved")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow_pickle", help="read adapter_model.bin (pickle can run code)")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16, float32, or auto: as it was trained")] = "auto",
) -> None:
    """Write adapter and base as one plain model.

    Other tools open it as any model. On probe prompts it is compared with the adapter on its base."""
    from trimtab.export.merge import merge as merged

    out = screen.console()
    merged(adapter, output_dir, model=model, dtype=dtype, allow_pickle=allow_pickle, console=out)
    out.print(Text.assemble(("talk to it  ", "dim"), (f"trimtab chat {output_dir}", "cyan")), soft_wrap=True)

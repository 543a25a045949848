"""`trimtab data check`: errors with file and line, the ledger, lengths, and what carries loss."""

from __future__ import annotations

from pathlib import Path

import typer

from trimtab.cli import help, screen
from trimtab.cli.settings import Extra, resolve
from trimtab.cli.train import CONFIG, need, tell_notes, wants_help
from trimtab.errors import ConfigError

USAGE = "trimtab data check DATA... --model MODEL [OPTIONS]"
ABOUT = """
Read DATA as `trimtab train` would, and show: the format that was found, every problem with its file and line, how \
many rows are kept and dropped, lengths, duplicates, and some rows with the tokens to be learnt in colour.
"""
DECIDING = ("val_size", "max_length", "overlong", "train_on", "max_train_samples", "seed")  # which rows, and how
OPTIONS = ("dataset", "val_dataset", *DECIDING, "chat_template", "model", "trust_remote_code")
EXTRAS = {"show": Extra(int, 3, "rows shown token by token")}


def check(ctx: typer.Context) -> None:
    """Check rows: errors by line, what is kept and dropped, lengths, which tokens are learnt."""
    out = screen.console()
    if wants_help(ctx.args):
        groups = help.run_options(OPTIONS)
        groups["Data"] += [*help.extra_options(EXTRAS), CONFIG]
        return help.page(out, USAGE, ABOUT, groups)
    settings = resolve(ctx.args, EXTRAS)
    options = settings.options
    need(options, "trimtab data check", "dataset", "model")
    if settings.extras["show"] < 0:
        raise ConfigError(f"show is {settings.extras['show']}; it must be at least 0")
    tell_notes(settings, out)
    from trimtab.data import Renderer
    from trimtab.data import check as check_rows
    from trimtab.train.load import load_tokenizer, model_folder

    tokenizer = load_tokenizer(model_folder(options.model), trust_remote_code=options.trust_remote_code)
    check_rows(
        [Path(p) for p in options.dataset],
        Renderer(tokenizer, chat_template=options.chat_template),
        val_sources=[Path(p) for p in options.val_dataset],
        show=settings.extras["show"],
        console=out,
        **{name: getattr(options, name) for name in DECIDING},
    )

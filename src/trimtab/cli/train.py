"""`trimtab train`: rows in, an adapter folder out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from shlex import quote
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from trimtab.cli import help, screen
from trimtab.cli.settings import Settings, resolve
from trimtab.errors import ConfigError
from trimtab.train.options import TrainOptions

USAGE = "trimtab train DATA... --model MODEL [OPTIONS]"
ABOUT = """
Fine-tune MODEL on your rows. The adapter folder goes to --output_dir (default: out); `trimtab chat out` opens it.

DATA is one or more files or folders (.jsonl .json .csv .parquet). This is enough to begin:

    trimtab train rows.jsonl --model ./SmolLM2-135M-Instruct

Every option may also stand in a flat YAML file, under the same name: --config run.yaml. Flags win over the file.
"""
AFTER = """
A true|false flag alone means true; --no_shuffle is --shuffle false.
The adapter's own options (--r, --lora_alpha, --target_modules, ...) are flags too: see `trimtab methods lora`.
Names of other tools (lora_rank, cutoff_len, ...) are understood; how each was read is printed.
"""
CONFIG = ("--config", "FILE", "a YAML file with any of these options", "")


def train(ctx: typer.Context) -> None:
    """Fine-tune a model on your rows."""
    out = screen.console()
    if wants_help(ctx.args):
        groups = help.run_options()
        groups["Run"].insert(0, CONFIG)
        return help.page(out, USAGE, ABOUT, groups, AFTER)
    settings = resolve(ctx.args)
    need(settings.options, "trimtab train", "dataset", "model")
    tell(settings, out)
    from trimtab.core.group import groups
    from trimtab.mergeable import never
    from trimtab.train.run import run

    result = run(settings.options, console=out)
    next_steps(settings.options, out, merges=not any(map(never, groups(result.model.get_base_model()).values())))


def wants_help(args: list[str]) -> bool:
    return not args or any(arg in ("--help", "-h") for arg in args)


def need(options: TrainOptions, command: str, *names: str) -> None:
    """What has no default and was not said."""
    examples = {"dataset": "rows.jsonl", "model": "--model FOLDER"}
    if missing := [n for n in names if not getattr(options, n)]:
        full = " ".join([command, *(examples[n] for n in names)])
        raise ConfigError(f"no {' and no '.join(missing)} was given. As in: {full}")


def tell(settings: Settings, out: Console) -> None:
    """How the options were understood, before anything is loaded; the run itself tells the rest."""
    tell_notes(settings, out)
    for name, text in summary(settings.options, settings.given):
        out.print(Text.assemble((f"{name:<10}", "bold"), text), soft_wrap=True)


def tell_notes(settings: Settings, out: Console) -> None:
    for note in settings.notes:
        out.print(Text(f"understood: {note}", style="dim"), soft_wrap=True)


def summary(options: TrainOptions, given: dict[str, str]) -> list[tuple[str, str]]:
    """What is tuned and how, and whatever else was said."""
    own = ", ".join(f"{k} {_short(v)}" for k, v in options.adapter_options.items())
    lines = [
        ("model", f"{options.model}{', in 4 bit' * options.load_in_4bit}"),
        ("adapter", f"that of {start}" if (start := options.init_adapter) else f"{options.adapter}: {own or 'its defaults'}"),
        ("output", options.output_dir),
    ]
    told = {"model", "load_in_4bit", "dataset", "adapter", "output_dir", "adapter_options"}
    rest = [f.name for f in dataclasses.fields(options) if f.name in given and f.name not in told]
    if rest:
        lines.append(("options", ", ".join(f"{n} {_short(getattr(options, n))}" for n in rest)))
    return lines


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def next_steps(options: TrainOptions, out: Console, *, merges: bool = True) -> None:
    path = Path(options.output_dir)
    here, merged, again, model = (quote(str(name)) for name in (path, f"{path}-merged", f"{path}-2", options.model))
    commands = [("talk to it", f"trimtab chat {here}")]
    if merges:
        commands.append(("make it a plain model", f"trimtab merge {here} --output_dir {merged}"))
    commands.append(("go on training", f"trimtab train DATA --model {model} --init_adapter {here} --output_dir {again}"))
    out.print()
    for what, command in commands:
        out.print(Text.assemble((f"{what:>22}  ", "dim"), (command, "cyan")), soft_wrap=True)

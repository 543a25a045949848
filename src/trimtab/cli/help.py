"""`--help` of the commands whose options are generated: groups, types, defaults, one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trimtab.cli.settings import PROSE, Extra
from trimtab.cli.values import is_bool, is_union
from trimtab.train.options import TrainOptions

Row = tuple[str, str, str, str]  # flag, value, help, default
GROUPS = ("Data", "Model", "Optimisation", "Run")


def page(console: Console, usage: str, about: str, groups: Mapping[str, list[Row]], after: str = "") -> None:
    console.print(Text(f"\n Usage: {usage}\n", style="bold"))
    console.print(Text("\n".join(f" {line}" for line in about.strip().splitlines()) + "\n"))
    width = max(len(row[0]) for rows in groups.values() for row in rows)
    for title, rows in groups.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True, min_width=width)
        table.add_column(style="yellow")
        table.add_column(ratio=1)
        for flag, value, text, default in rows:
            shown = Text.assemble(text, (f"  [{default}]", "dim") if default else "")
            table.add_row(flag, value, shown)
        console.print(Panel(Group(table), title=title, title_align="left", border_style="dim"))
    if after:
        console.print(Text("\n".join(f" {line}" for line in after.strip().splitlines()) + "\n"))


def run_options(only: tuple[str, ...] = ()) -> dict[str, list[Row]]:
    """The options of a run by group; `only` these, where a command takes few of them."""
    hints = get_type_hints(TrainOptions)
    groups: dict[str, list[Row]] = {name: [] for name in GROUPS}
    for field in dataclasses.fields(TrainOptions):
        group = field.metadata["group"]
        if group in groups and (not only or field.name in only):
            groups[group].append(option(field.name, hints[field.name], field.metadata["help"], default_of(field)))
    return {name: rows for name, rows in groups.items() if rows}


def extra_options(extras: Mapping[str, Extra]) -> list[Row]:
    return [option(name, e.hint, e.help, e.default) for name, e in extras.items()]


def option(name: str, hint: Any, text: str, default: Any) -> Row:
    return f"--{name}", "TEXT" if name in PROSE else metavar(hint), text, shown(default)


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default is not dataclasses.MISSING else None


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, float):
        return f"{default:g}"
    return "" if default is None or default == "" else str(default)


def metavar(hint: Any) -> str:
    """What to write after the flag."""
    if is_bool(hint):
        return "true|false"
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    kinds = {get_origin(h) or h for h in (get_args(hint) if is_union(hint) else (hint,))}
    if bool in kinds:
        return "true|false|TEXT"
    for kind, word in ((list, "A,B,..."), (float, "NUMBER"), (int, "N"), (dict, "{...}")):
        if kind in kinds:
            return word
    return "TEXT"

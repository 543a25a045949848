"""`--help` of every command, in one form: groups, values, defaults, one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trimtab.cli import screen
from trimtab.cli.settings import PROSE, Extra
from trimtab.cli.values import is_bool, is_union
from trimtab.train.options import TrainOptions

Row = tuple[str, str, str, str]  # flag, value, help, default
GROUPS = ("Data", "Model", "Optimisation", "Run")
WIDEST = 18  # of a value; longer choices stand in the help, for a narrow terminal


def page(console: Console, usage: str, about: str, groups: Mapping[str, list[Row]], after: str = "") -> None:
    _prose(console, f"\nUsage: {usage}\n", "bold")
    _prose(console, about.strip() + "\n")
    width = max((len(row[0]) for rows in groups.values() for row in rows), default=0)
    for title, rows in groups.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True, min_width=width)
        table.add_column(style="yellow")
        table.add_column(ratio=1)
        for flag, value, text, default in rows:
            table.add_row(flag, value, Text.assemble(text, (f"  [{default}]", "dim") if default else ""))
        console.print(Panel(Group(table), title=title, title_align="left", border_style="dim"))
    if after:
        _prose(console, after.strip() + "\n")


def _prose(console: Console, text: str, style: str = "") -> None:
    console.print(Padding(Text(text, style), (0, 1)))


def command(cmd: Any, path: str) -> None:
    """A command whose options are its function's parameters."""
    hints, groups = get_type_hints(cmd.callback), dict[str, list[Row]](Arguments=[], Options=[])
    for p in cmd.params:
        if p.param_type_name == "argument":
            groups["Arguments"].append((p.metavar, "", p.help, ""))
        else:
            value = "" if hints[p.name] is bool else p.metavar or metavar(hints[p.name])  # such a flag takes no value
            groups["Options"].append((p.opts[0], value, p.help, shown(p.default) if value and not p.required else ""))
    page(screen.console(), f"{path} {' '.join(pieces(cmd))}", cmd.help, {k: rows for k, rows in groups.items() if rows})


def commands(group: Any, path: str, names: list[str]) -> None:
    """A command of commands."""
    rows = [(name, "", (group.commands[name].help or "").partition("\n")[0], "") for name in names]
    groups = {"Commands": rows, "Options": [(p.opts[0], "", p.help, "") for p in group.params]}
    after = f"The options of a command: {path} COMMAND --help\n{group.epilog or ''}"
    page(screen.console(), f"{path} COMMAND ...", group.help, {k: rows for k, rows in groups.items() if rows}, after)


def pieces(cmd: Any) -> list[str]:
    """What a usage line says after the command's name: arguments, options that must be there, the others."""
    arguments = [p.metavar if p.required else f"[{p.metavar}]" for p in cmd.params if p.param_type_name == "argument"]
    required = [f"{p.opts[0]} {p.metavar}" for p in cmd.params if p.param_type_name == "option" and p.required]
    return [*arguments, *required, "[OPTIONS]"]


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
    value = "TEXT" if name in PROSE else metavar(hint)
    if len(value) > WIDEST:
        value, text = "TEXT", f"{text}; one of {value.replace('|', ', ')}"
    return f"--{name}", value, text, shown(default)


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
    if hint is Any:
        return "YAML"
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

"""The `trimtab` command. Heavy imports live inside the commands, so `--help` answers at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trimtab.cli import chat, data, demo, doctor, help, merge, methods, screen, sites, train

_DAY = ("demo", "data", "train", "chat", "merge", "doctor", "methods", "sites")


class Listed(TyperGroup):
    """Commands, with a `--help` in the form that all have."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        help.commands(self, ctx.command_path, self.list_commands(ctx))


class Commands(Listed):
    """All commands: in the order of a first day, with errors as messages."""

    def invoke(self, ctx: Any) -> Any:
        with screen.quiet(), screen.reported() as codes:
            return super().invoke(ctx)
        raise typer.Exit(codes[0])

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: _DAY.index(name) if name in _DAY else len(_DAY))


class Declared(TyperCommand):
    """A command whose options are its function's parameters."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        help.command(self, ctx.command_path)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return help.pieces(self)


class Generated(TyperCommand):
    """A command that reads its own arguments, because its flags are generated from `TrainOptions`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


# `--max-new-tokens` is `--max_new_tokens`
_EITHER = {"token_normalize_func": lambda name: name.replace("-", "_") if len(name) > 1 else name}

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=_EITHER,
    help="Fine-tune a large model on hardware you own: your rows in, an adapter out, checked at every step.",
    epilog="First time here? Run: trimtab demo",
)
_data = typer.Typer(cls=Listed, no_args_is_help=True, help="Look at rows before training on them.")

app.command("demo", cls=Declared)(demo.demo)
app.command("train", cls=Generated, add_help_option=False)(train.train)
app.add_typer(_data, name="data")
_data.command("check", cls=Generated, add_help_option=False)(data.check)
app.command("chat", cls=Declared)(chat.chat)
app.command("merge", cls=Declared)(merge.merge)
app.command("doctor", cls=Declared)(doctor.doctor)
app.command("methods", cls=Declared)(methods.methods)
app.command("sites", cls=Generated, add_help_option=False)(sites.sites)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        screen.say(f"trimtab {version('trimtab')}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")


@app.callback()
def _all(version: Annotated[bool, _VERSION] = False) -> None: ...


def main() -> None:
    app(prog_name="trimtab")

"""The `trimtab` command. Heavy imports live inside the commands, so `--help` answers at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trimtab.cli import chat, data, demo, doctor, merge, methods, screen, sites, train

_DAY = ("demo", "data", "train", "chat", "merge", "doctor", "methods", "sites")


class Commands(TyperGroup):
    """All commands: in the order of a first day, with errors as messages."""

    def invoke(self, ctx: Any) -> Any:
        with screen.quiet(), screen.reported() as codes:
            return super().invoke(ctx)
        raise typer.Exit(codes[0])

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: _DAY.index(name) if name in _DAY else len(_DAY))


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
_data = typer.Typer(no_args_is_help=True, help="Look at rows before training on them.")

app.command("demo")(demo.demo)
app.command("train", cls=Generated, add_help_option=False)(train.train)
app.add_typer(_data, name="data")
_data.command("check", cls=Generated, add_help_option=False)(data.check)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("doctor")(doctor.doctor)
app.command("methods")(methods.methods)
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

"""`trimtab methods`: what there is, as equations; `trimtab methods NAME`: the options of one."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.cli import help, screen
from trimtab.cli.settings import adapter_fields
from trimtab.train.options import TrainOptions

if TYPE_CHECKING:
    from trimtab.core.config import Method

_PAPER = re.compile(r"\s*(?:arXiv:)?(\d{4}\.\d{4,5}(?:v\d+)?)")
_REFERENCE = re.compile(r"\s{2,}arXiv:.*$")


def methods(
    name: Annotated[str | None, typer.Argument(help="one method: its options", show_default=False)] = None,
) -> None:
    """List the methods, or the options of one."""
    out = screen.console()
    if name:
        return _one(name, out)
    from trimtab.core.config import load
    from trimtab.core.config import methods as names

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("method", "equation", "paper", "merges", "config"):
        table.add_column(column, no_wrap=column != "equation")
    for method in map(load, names()):
        equation, papers = formula(method.adapter)
        switch = f", {method.switch}=true" if method.switch else ""
        config = f"{method.config.__name__}{switch}"
        table.add_row(Text(method.name, "bold"), Text(equation), ", ".join(papers), _merges(method), config)
    out.print(table)
    after = "\nmerges: the adapter can be written into the weights. Options of one: trimtab methods lora"
    out.print(Text(after, "dim"))


def _one(name: str, out: Console) -> None:
    from trimtab.core.config import load
    from trimtab.train.check import adapter_options

    method = load(name)
    equation, papers = formula(method.adapter)
    about = "\n".join([equation, *(f"https://arxiv.org/abs/{paper}" for paper in papers)])
    ours = adapter_options(TrainOptions(adapter=method.name))
    rows = [row(f, hint, ours) for f, hint in own_fields(method.name) if f.name != method.switch]
    usage = f"trimtab train DATA --model MODEL --adapter {method.name} [OPTIONS]"
    if method.switch:
        kind = method.config.peft_type.lower()
        usage = f"trimtab train DATA --model MODEL --adapter {method.name} (or: --adapter {kind} --{method.switch})"
    help.page(out, usage, about, {f"Options of {method.name}": rows})


def own_fields(name: str) -> list[tuple[dataclasses.Field[Any], Any]]:
    """What can be set in this version, the method's own first; a published config has fields for parts that are not
    here yet."""
    from trimtab.core.config import config_class

    config = config_class(name)
    hints, fields = get_type_hints(config), adapter_fields(name)
    inherited = {f.name for base in config.__bases__ for f in dataclasses.fields(base)}
    shown = sorted((f for f in fields.values() if _here(f, fields)), key=lambda f: f.name in inherited)
    return [(f, hints[f.name]) for f in shown]


def _here(field: dataclasses.Field[Any], fields: dict[str, dataclasses.Field[Any]]) -> bool:
    if owner := field.metadata.get("of"):
        return _here(fields[owner], fields)
    variant = field.metadata.get("variant")
    absent = variant and importlib.util.find_spec(f"trimtab.methods.{variant}") is None
    return not absent and not field.metadata.get("later")


def row(field: dataclasses.Field[Any], hint: Any, ours: dict[str, Any]) -> help.Row:
    """`ours`: what a run takes where nothing is said, if that is not the published default."""
    return help.option(field.name, hint, field.metadata.get("help", ""), ours.get(field.name, help.default_of(field)))


def formula(adapter: type) -> tuple[str, list[str]]:
    """The equation (the first line of the docstring) and the papers that it names."""
    first, *_ = (inspect.getdoc(adapter) or "").splitlines() or [""]
    reference = _REFERENCE.search(first)
    papers = _PAPER.findall(reference.group()) if reference else []
    return re.sub(r"\s{3,}", "  ", _REFERENCE.sub("", first)).strip(), papers


def _merges(method: Method) -> str:
    from trimtab.core.adapter import Adapter

    kind = method.adapter
    if not issubclass(kind, Adapter):
        return "no"
    means = kind.weight is not Adapter.weight or kind.bias is not Adapter.bias
    return "yes" if means and not kind.routed else "no"

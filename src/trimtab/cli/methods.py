"""`trimtab methods`: what there is, as equations; `trimtab methods NAME`: the options of one."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
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

AFTER = """
Where to start: lora. How many numbers each of the others trains, and on what it works: docs/methods.md.
acts on: linear layers are torch's, transformers' Conv1D and 4-bit ones alike; conv is 1d, 2d and 3d; modules: attention, \
feed-forward blocks, whole layers. merges: the adapter can be written into the weights.
Options, config class and paper of one: trimtab methods lora"""
WIDE = 100  # columns of a terminal that has room for the papers' numbers
_PAPER = re.compile(r"\s*(?:arXiv:)?(\d{4}\.\d{4,5}(?:v\d+)?)")
_REFERENCE = re.compile(r"\s{2,}(arXiv:.*|no paper)$")


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one method: its options")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="what each does on every kind of layer, in Markdown")] = False,
    peer: Annotated[Path | None, typer.Option(metavar="FILE", help="for --markdown: a CSV table to compare with")] = None,
) -> None:
    """List the methods, or the options of one."""
    out = screen.console()
    if name:
        return _one(name, out)
    from trimtab.core.config import load
    from trimtab.core.config import methods as names

    if markdown:
        return typer.echo(page(peer), nl=False)

    wide = out.width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("method", "equation", "acts on", "merges", *(["paper"] if wide else [])):
        width = (29 if wide else 16) if column == "acts on" else None  # 29: four kinds in one line
        table.add_column(column, no_wrap=column not in ("equation", "acts on"), width=width, overflow="fold")
    for method in map(load, names()):
        equation, papers = formula(method.adapter)
        how = (f"\n{_switched(method)}", "dim") if method.switch else ""
        cells = [Text.assemble(equation, how), ", ".join(_acts_on(method)), _merges(method), "\n".join(papers)]
        table.add_row(Text(method.name, "bold"), *cells[: 4 if wide else 3])
    out.print(table)
    out.print(Text(AFTER, "dim"))


def page(peer: Path | None = None) -> str:
    """docs/methods.md."""
    from trimtab.cli import facts
    from trimtab.core.config import load
    from trimtab.core.config import methods as names

    return facts.page([load(name) for name in names()], formula, peer)


def _one(name: str, out: Console) -> None:
    from trimtab.cli import facts
    from trimtab.core.config import load
    from trimtab.train.check import adapter_options

    method = load(name)
    equation, papers = formula(method.adapter)
    about = "\n".join([equation, *(f"https://arxiv.org/abs/{paper}" for paper in papers), *facts.told(facts.facts(method))])
    ours = adapter_options(TrainOptions(adapter=method.name))
    fields = own_fields(method.name)
    rows = [row(f, hint, ours) for f, hint in fields if not (method.switch and f.metadata.get("variant"))]
    about += f"\nin Python: {method.config.__name__}"
    usage = f"trimtab train DATA... --model MODEL --adapter {method.name}"
    if method.switch:
        about += f"; the same as {_switched(method)}"
        flag, value, text = _switch(method)
        if options := _options_of(method):
            rows.insert(0, (flag, value, f"a mapping of {options}", ""))
        elif value:
            usage += f" {flag} {value}"
            rows.insert(0, (flag, value, text, ""))
    help.page(out, f"{usage} [OPTIONS]", about, {f"Options of {method.name}": rows})


def _switch(method: Method) -> tuple[str, str, str]:
    """The option that turns a variant on: flag, value if it needs one, help."""
    field, hint = next((f, hint) for f, hint in own_fields(method.name) if f.name == method.switch)
    flag, value, *_ = row(field, hint, {})
    return flag, "" if value == "true|false" else value, field.metadata["help"]


def _switched(method: Method) -> str:
    """A variant, as it is asked for by the name of what it varies."""
    flag, value, _ = _switch(method)
    return f"--adapter {method.config.peft_type.lower()} {flag} {value}".rstrip()


def _options_of(method: Method) -> str:
    """Of a variant whose switch holds options of its own: their names and defaults."""
    from trimtab.core.config import config_for

    held = getattr(config_for(method.name), method.switch or "", None)
    fields = dataclasses.fields(held) if dataclasses.is_dataclass(held) else ()
    return ", ".join(f"{f.name} ({f.metadata['help']}) [{getattr(held, f.name)}]" for f in fields)


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
    variant, text = field.metadata.get("variant"), field.metadata.get("help", "")
    text += f" (the same as --adapter {variant})" if variant else ""
    hint = dict if "holds" in field.metadata else hint
    return help.option(field.name, hint, text, ours.get(field.name, help.default_of(field)))


def formula(adapter: type) -> tuple[str, list[str]]:
    """The equation (the first line of the docstring) and the papers that it names."""
    first, *_ = (inspect.getdoc(adapter) or "").splitlines() or [""]
    reference = _REFERENCE.search(first)
    papers = _PAPER.findall(reference.group()) if reference else []
    return re.sub(r"\s{3,}", "  ", _REFERENCE.sub("", first)).strip(), papers


def _acts_on(method: Method) -> list[str]:
    """The kinds of layers that it builds on, found by building it on one of each."""
    from torch import nn

    from trimtab.core.adapter import Adapter, Site
    from trimtab.core.base import port
    from trimtab.core.config import config_for
    from trimtab.errors import NotSupported

    if not issubclass(method.adapter, Adapter):
        return ["the whole model"]
    if method.adapter.among:
        return ["its experts' layers"]
    cfg, found = config_for(method.name, **method.small, target_modules=["layer"]), []
    for layer in (nn.Linear(8, 8), nn.Embedding(8, 8), nn.Conv2d(8, 8, 1), nn.LayerNorm(8)):
        site = Site("layer", port(layer))
        try:
            shared = method.adapter.share(cfg, [site])
            method.adapter(cfg, dataclasses.replace(site, shared=shared))
            found.append(site.kind)
        except NotSupported:
            continue
    return found + ["modules"] * method.adapter.on_modules


def _merges(method: Method) -> str:
    from trimtab.core.adapter import Adapter

    kind = method.adapter
    if not issubclass(kind, Adapter):
        return "no"
    means = kind.weight is not Adapter.weight or kind.bias is not Adapter.bias
    return "yes" if means and not kind.routed else "no"

"""`trimtab sites`: where a pattern would act and what it would train, without loading weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.cli import help, screen
from trimtab.cli.settings import Settings, resolve
from trimtab.cli.train import CONFIG, need, tell_notes, wants_help
from trimtab.errors import ConfigError

USAGE = "trimtab sites MODEL [OPTIONS]"
ABOUT = """
Show which layers of MODEL an adapter would change, and how many parameters it would train. Only the model's \
config.json is read. The adapter's own options (--r, ...) are flags too: see `trimtab methods lora`. An example:

    trimtab sites ./SmolLM2-135M-Instruct --target_modules q_proj,v_proj
"""


def sites(ctx: typer.Context) -> None:
    """Show which layers an adapter would change, and how many parameters it would train."""
    out = screen.console()
    if wants_help(ctx.args):
        groups = help.run_options(("model", "adapter", "trust_remote_code"))
        target = ("--target_modules", "A,B,...", "names of layers, a regex, or `all-linear`", "all-linear for lora")
        groups["Model"] += [target, CONFIG]
        return help.page(out, USAGE, ABOUT, groups)
    settings = resolve(ctx.args, positional="model")
    need(settings.options, "trimtab sites", "model")
    tell_notes(settings, out)
    model = adapted(settings)
    _show(model, settings, out)


def adapted(settings: Settings) -> Any:
    """The model as a shape without weights, with the adapter on it."""
    from trimtab.core.config import config_for
    from trimtab.model import get_peft_model
    from trimtab.train.check import adapter_options
    from trimtab.train.load import skeleton

    options = settings.options
    config = config_for(options.adapter, **adapter_options(options))
    try:
        return get_peft_model(skeleton(options.model, trust_remote_code=options.trust_remote_code), config)
    except NotImplementedError as error:  # torch's, where a value is asked of a tensor that has none
        raise ConfigError(
            f"what {options.adapter} trains depends on the weights themselves, and `trimtab sites` reads none: "
            f"the line `adapter` of `trimtab train` counts it"
        ) from error


def _show(model: Any, settings: Settings, out: Console) -> None:
    from trimtab.core.group import adapted as layers_of
    from trimtab.core.group import groups

    base = model.get_base_model()
    count: Counter[tuple[str, tuple[int, ...]]] = Counter()
    trained: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for path, layer in layers_of(base):
        key = (path.rpartition(".")[2], tuple(layer.port.shape))
        count[key] += 1
        trained[key] += sum(p.numel() for p in layer.adapters.parameters() if p.requires_grad)
    if count:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("layer", "number", "shape", "trained in each", "trained"):
            table.add_column(column, justify="left" if column in ("layer", "shape") else "right")
        for (leaf, shape), n in count.items():
            total = trained[leaf, shape]
            size = " x ".join(map(str, shape)) or "whole"
            table.add_row(Text(leaf, "bold"), f"{n}", size, f"{total // n:,}", f"{total:,}")
        out.print(table)
    else:
        hook = type(groups(base)["default"].adapter).__name__
        out.print(Text(f"{hook} acts on the model as a whole: no single layer is changed"))
    on, everything = model.get_nb_trainable_parameters()
    out.print(Text(f"\n{settings.options.adapter}: {on:,} trained of {everything:,} ({on / everything:.2%})"))
    if rest := untouched(base):
        out.print(Text("untouched: " + ", ".join(f"{leaf} ({n})" for leaf, n in rest.items()), "dim"), soft_wrap=True)


def untouched(base: Any) -> dict[str, int]:
    """Layers with a weight that no adapter acts on, by name."""
    from trimtab.core.base import port
    from trimtab.core.layer import AdapterLayer
    from trimtab.core.sites import frozen, layers

    plain = [(n, m) for n, m in layers(base) if not isinstance(m, AdapterLayer)]
    return Counter(n.rpartition(".")[2] for n, m in plain if port(frozen(m)).op.kind not in ("module", "norm"))

"""What each method does on each kind of layer, found by doing it: the page that docs/methods.md is."""

from __future__ import annotations

import csv
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.convert import convert_to_lora
from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import port
from trimtab.core.config import PeftConfig, config_for
from trimtab.errors import ConfigError, NotMergeable, TrimtabError
from trimtab.model import PeftModel, get_peft_model

if TYPE_CHECKING:
    from trimtab.core.config import Method

YES, FORWARD, NO, WRONG = "yes", "forward", "no", "wrong"
WIDTH = 4096


class Host(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.attends = layer, isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x, x, need_weights=False)[0] if self.attends else self.layer(x)


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 12)


def _four_bit() -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    layer: Any = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    weight: Any = Params4bit
    layer.weight = weight(0.1 * torch.randn(32, 64), requires_grad=False, quant_type="nf4")._quantize("cpu")
    return layer.requires_grad_(False)


@dataclass(frozen=True)
class Kind:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None  # of an input; none: token ids
    rounds: bool = False  # a merged weight is rounded to what the layer stores


KINDS = {
    "linear": Kind(lambda: nn.Linear(12, 8), (2, 3, 12)),
    "Conv1D": Kind(_conv1d, (2, 3, 12)),
    "4-bit": Kind(_four_bit, (2, 3, 64), rounds=True),
    "embedding": Kind(lambda: nn.Embedding(11, 8), None),
    "conv1d": Kind(lambda: nn.Conv1d(4, 8, 3), (2, 4, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(4, 8, 3), (2, 4, 6, 6)),
    "conv3d": Kind(lambda: nn.Conv3d(4, 8, 2), (2, 4, 4, 4, 4)),
    "norm": Kind(lambda: nn.LayerNorm(12), (2, 3, 12)),
    "attention": Kind(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
}
USES = ("several", "mixed batch", "to LoRA")
COLUMNS = (*KINDS, *USES)


@dataclass
class Facts:
    """One method. `cells`: by column; of a kind of layer `yes` (forward and merge agree), `forward` (it cannot be merged),
    `no` (refused, with the reason), `wrong` (the two differ); empty where a column means nothing."""

    name: str
    numbers: int | None = None
    cells: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def merges(self) -> str:
        return YES if YES in (self.cells.get(kind) for kind in KINDS) else NO


def facts(method: Method) -> Facts:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = Facts(method.name, _numbers(method))
        if issubclass(method.adapter, Adapter) and not method.adapter.among:
            found.cells = {name: _kind(method, kind) for name, kind in KINDS.items()}
            first = next((KINDS[name] for name, cell in found.cells.items() if cell in (YES, FORWARD)), None)
            uses = zip(USES, (_several, _mixed, _to_lora), strict=True)
            found.cells |= {name: (look(method, first) if first else NO) for name, look in uses}
        return found


# -- probes -----------------------------------------------------------------------------------------------------------
def _config(method: Method) -> PeftConfig:
    return config_for(method.name, **method.small | {"target_modules": ["layer"]})


def _model(method: Method, kind: Kind) -> PeftModel:
    torch.manual_seed(0)
    return _moved(get_peft_model(Host(kind.make()), _config(method)))


def _moved(model: PeftModel) -> PeftModel:
    """What is trained, off its start."""
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.2 * torch.randn(p.shape))
    return model.eval()


def _input(kind: Kind) -> Tensor:
    return torch.randint(0, 11, (2, 5)) if kind.shape is None else torch.randn(kind.shape)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * max(1.0, b.abs().max().item()))


@torch.no_grad()
def _kind(method: Method, kind: Kind) -> str:
    try:
        model = _model(method, kind)
    except TrimtabError:
        return NO
    x = _input(kind)
    y = model(x)
    try:
        model.merge_adapter()
    except NotMergeable:
        return FORWARD
    return YES if kind.rounds or _same(model(x), y) else WRONG


@torch.no_grad()
def _several(method: Method, kind: Kind) -> str:
    """Two of them active: what they do together is neither of the two alone, and merges to the same."""
    try:
        model = _model(method, kind)
        model.add_adapter("other", _config(method))
        model.set_adapter("other")
        _moved(model)
        x, alone = _input(kind), {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(x)
        model.set_adapter(["default", "other"])
    except TrimtabError:
        return NO
    y = model(x)
    if any(_same(y, other) for other in alone.values()):
        return WRONG
    try:
        model.merge_adapter()
    except NotMergeable:
        return YES
    return YES if _same(model(x), y) else WRONG


@torch.no_grad()
def _mixed(method: Method, kind: Kind) -> str:
    """A row with the adapter and one without, in one call: as a batch of each."""
    model, x = _model(method, kind), _input(kind)
    with_it = model(x[:1])
    with model.disable_adapter():
        without = model(x)
    try:
        y = model(x, adapter_names=["default", "__base__"])
    except (TrimtabError, TypeError):
        return NO
    return YES if _same(y, torch.stack([with_it[0], without[1]])) else WRONG


def _to_lora(method: Method, kind: Kind) -> str:
    try:
        made = convert_to_lora(_model(method, kind), 1.0)
    except TrimtabError:
        return NO
    return YES if made.fit.error < 1e-4 else WRONG


def _numbers(method: Method) -> int | None:
    """How many numbers it trains for one 4096 x 4096 layer at its defaults, what its layers share included; of a method that
    acts around a model, for one of that width. None where it has no defaults."""
    if not issubclass(method.adapter, Adapter):
        return _around(method)
    if method.adapter.among:
        return None  # as many as the adapters it stands among make of it
    names = {f.name for f in dataclasses.fields(method.config)}
    target = {"target_modules": ["layer"]} if "target_modules" in names else {}
    try:
        cfg = config_for(method.name, **target)
    except ConfigError:  # fields without a default
        empty = {f.name for f in dataclasses.fields(method.config) if f.default is None}
        cfg = config_for(method.name, **{k: v for k, v in method.small.items() if k in empty} | target)
    try:
        with torch.device("meta"):
            layer = nn.Linear(WIDTH, WIDTH)
        return _count(method, cfg, layer)
    except (NotImplementedError, RuntimeError):  # it looks at the weights: the curve through three smaller layers
        a, b, c = (_count(method, cfg, nn.Linear(n, n)) for n in (WIDTH // 16, WIDTH // 8, WIDTH // 4))
        return a * 56 - b * 90 + c * 35
    except TrimtabError:
        return None


def _count(method: Method, cfg: Any, layer: nn.Module) -> int:
    site = Site("layer", port(layer))
    site = dataclasses.replace(site, shared=method.adapter.share(cfg, [site]))
    return sum(p.numel() for p in method.adapter(cfg, site).parameters())


def _around(method: Method) -> int | None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=32, num_key_value_heads=32)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=64, **sizes))
    more = {"num_virtual_tokens": 20} if "num_virtual_tokens" in {f.name for f in dataclasses.fields(method.config)} else {}
    try:
        made = method.adapter(config_for(method.name, **method.small | more | {"task_type": "CAUSAL_LM"}), model)
        return sum(p.numel() for p in made.parameters())
    except (TrimtabError, NotImplementedError, RuntimeError):
        return None


# -- the page ---------------------------------------------------------------------------------------------------------
def read_peer(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row.pop("method"): row for row in csv.DictReader(file)}


HEAD = ("method", "equation", "paper", "trains", "layers", "bases", "merges", *USES)
ABOUT = f"""\
# Methods

Found by doing it, on small layers, for every method of the registry:

    trimtab methods --markdown --peer docs/peft_methods.csv > docs/methods.md

*trains*: how many numbers, for one {WIDTH} x {WIDTH} layer at the defaults, with what layers share; ~: around a model of that
width with one layer. *layers*: in brackets where what it does depends on the input, so that it cannot be merged; elsewhere
forward and merged layer agree. *several*: active at once. *mixed batch*: another adapter, or none, for each row of a call.
*to LoRA*: `save_as_lora`, exact at full rank.
"""


def page(methods: list[Method], formula: Callable[[type], tuple[str, list[str]]], peer: Path | None = None) -> str:
    """The whole page; with the peer's matrix, what is filled of its holes."""
    found = {m.name: (m, facts(m)) for m in methods}
    lines = [ABOUT, *_table(HEAD, [_row(m, f, *formula(m.adapter)) for m, f in found.values()])]
    if peer is not None:
        theirs = read_peer(peer)
        ours = {name: f.cells | {"merges": f.merges} for name, (_, f) in found.items()}
        lines += ["", *_against(ours, theirs)]
    return "\n".join(lines) + "\n"


def told(f: Facts) -> list[str]:
    """For one method, in words."""
    what = f"a {WIDTH} x {WIDTH} layer" if f.cells else f"a model of width {WIDTH} with one layer"
    lines = [] if f.numbers is None else [f"trains {f.numbers:,} numbers for {what} at its defaults"]
    cells = f.cells | {"merges": f.merges}
    shown = "; ".join(f"{column}: {cell}" for column, cell in cells.items() if cell)
    return [*lines, f"works on and with (forward: works, but cannot be merged; more in docs/methods.md): {shown}"]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *rows)]


def _row(method: Method, f: Facts, equation: str, papers: list[str]) -> list[str]:
    links = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in papers)
    around = not f.cells
    trains = "" if f.numbers is None else f"{'~' * around}{f.numbers:,}"
    kinds = ", ".join(k if f.cells[k] == YES else f"({k})" for k in KINDS if k != "4-bit" and f.cells.get(k) in (YES, FORWARD))
    bases = "any" if around else ", ".join(["dense", *(["4-bit"] if f.cells.get("4-bit") in (YES, FORWARD) else [])])
    uses = [f.cells.get(use, NO) for use in USES]
    return [method.name, _plain(equation), links, trains, "the model" if around else kinds, bases, f.merges, *uses]


def _plain(text: str) -> str:
    """Free of what Markdown reads as its own."""
    for sign in ("\\", "|", "*", "_", "<", "["):
        text = text.replace(sign, f"\\{sign}")
    return text


def _against(ours: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> list[str]:
    columns = tuple(next(iter(theirs.values())))
    filled = {name: _better(cells, theirs[name]) for name, cells in ours.items() if name in theirs}
    worse = {name: _better(theirs[name], cells) for name, cells in ours.items() if name in theirs}
    alone = [name for name in ours if name not in theirs]
    head = ["## The same of `peft` 0.21.2", ""]
    head += ["From its sources, and from runs where a CPU can run it. no: refused, or it fails; forward: right, and cannot be"]
    head += ["merged; wrong: accepted, with wrong results or without effect; accident: taken for another kind of layer, so"]
    head += ["that the forward is right and merging fails; one: one adapter at a time; ?: not known.", ""]
    rest = _table(("method", "there, and here"), [[n, _cells(theirs[n], ours[n], h)] for n, h in worse.items() if h])
    count = sum(map(len, filled.values()))
    return [
        *head,
        *_table(("method", *columns), [[name, *row.values()] for name, row in sorted(theirs.items())]),
        "",
        "## Holes of that table which are filled here",
        "",
        f"{count} in {sum(map(bool, filled.values()))} methods. Not in `peft`: {', '.join(alone) or 'none'}.",
        "",
        *_table(("method", "here, and there"), [[n, _cells(ours[n], theirs[n], h)] for n, h in filled.items() if h]),
        "",
        "## What it does and trimtab does not",
        "",
        *(rest if any(worse.values()) else ["Nothing of that table."]),
    ]


def _better(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """The columns in which `a` can do more; none where one of the two says that a column means nothing."""
    rank = {YES: 2, FORWARD: 1}
    return [c for c, cell in a.items() if "-" not in (cell, b.get(c, "-")) and rank.get(cell, 0) > rank.get(b[c], 0)]


def _cells(a: dict[str, str], b: dict[str, str], columns: list[str]) -> str:
    return "; ".join(f"{column}: {a[column]}, {b[column]}" for column in columns)

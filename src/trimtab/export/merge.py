"""`trimtab merge`: the base that was trained on and the adapter as one plain model, compared before it is kept.

The sum is taken in float32 and rounded once, to the dtype that is written. A run on a 4-bit base was trained on the
weights that its codes stand for, so these, not the original ones, are what the adapter is added to.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from trimtab import origin
from trimtab.core.base import port
from trimtab.core.config import PeftConfig
from trimtab.data import Renderer
from trimtab.errors import ConfigError, NotMergeable, TrimtabError, TrimtabWarning, nearest
from trimtab.export import stream
from trimtab.export.probes import KERNEL, TOLERANCE, Difference, compare, logits, probes
from trimtab.export.stream import in_float32
from trimtab.files import read_json, try_folder, write_text
from trimtab.model import PeftModel, get_peft_model
from trimtab.train import load

REPORT, CARD = "merge_report.json", "README.md"
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what, and how near it is."""

    output_dir: Path
    adapter: str
    base: str
    dtype: str
    load_in_4bit: bool
    difference: Difference
    tolerance: float
    shard_by_shard: bool = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"output_dir": str(self.output_dir), "relative_difference": self.difference.relative}


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from: its base, and in which form the base was trained on."""

    base: Path
    load_in_4bit: bool
    dtype: torch.dtype  # that the run computed in; where no run is recorded, of the base's own weights
    stored: torch.dtype = torch.float32  # in which the base is held while it is merged: nothing is lost in it


def merge(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    allow_pickle: bool = False,
    console: Console | None = None,
) -> MergeReport:
    """Write a plain transformers model (and tokenizer) to `output_dir`; raise `NotMergeable` where it differs from the
    adapter by more than rounding. `dtype` auto: what the run computed in (the base's own, where no run is recorded).
    In memory there is the base as it is stored, and a shard of what is written."""
    adapter, out, console = Path(adapter_dir).expanduser(), Path(output_dir).expanduser(), console or Console()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"output_dir {str(out)!r} exists and is not empty: choose a new folder")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    try_folder(out, "output_dir")
    source = find_source(adapter, model)
    source = replace(source, stored=source.dtype if source.load_in_4bit else _stored(adapter, source.base))
    target = source.dtype if dtype == "auto" else getattr(torch, dtype)
    tokenizer = load.load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else source.base)
    ids = probes(adapter, Renderer(tokenizer))
    expected = _expected(adapter, source, ids, allow_pickle)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        streamed = _write(adapter, source, target, tokenizer, partial, allow_pickle)
        found = compare(expected, _logits(load.load_model(partial, dtype=target), ids))
        limit = TOLERANCE[target] + (KERNEL if source.load_in_4bit and source.dtype is not torch.float32 else 0)
        report = MergeReport(
            out, str(adapter), str(source.base), _name(target), source.load_in_4bit, found, limit, streamed
        )
        _bounded(report, console)
        write_text(partial / REPORT, json.dumps(report.as_dict(), indent=2) + "\n")
        write_text(partial / CARD, card(report))
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def find_source(adapter: Path, model: str | None = None) -> Source:
    """Read the adapter's config and run record; `model` says where the base is now."""
    config = PeftConfig.from_pretrained(adapter)
    record = _record(adapter)
    name: Any = model or config.base_model_name_or_path or record.get("model")
    if not name or not isinstance(name, str):
        raise ConfigError(f"{adapter} does not say what its base is: --model FOLDER")
    try:
        base = load.model_folder(name)
    except ConfigError as problem:
        where = "" if model else "\nThis is the base that the adapter names. If it lies elsewhere now: --model FOLDER"
        raise ConfigError(f"{problem}{where}") from problem
    options: Any = record.get("options")
    four_bit = bool(options.get("load_in_4bit")) if isinstance(options, dict) else False
    four_bit = four_bit or bool((origin.read(adapter) or {}).get("load_in_4bit"))
    stored = read_json(base / "config.json") if "dtype" not in record else record
    named = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    if named not in DTYPES[1:]:
        raise ConfigError(f"{adapter if stored is record else base} names the dtype {named!r}; known: {', '.join(DTYPES[1:])}")
    return Source(base, four_bit, getattr(torch, named))


def _record(adapter: Path) -> dict[str, Any]:
    path = adapter / "run.json"
    return read_json(path) if path.is_file() else {}


def _stored(adapter: Path, base: Path) -> torch.dtype:
    """The one dtype of the base's weights. float32 where there are several, and for a method that starts from the weights'
    values: what it makes of them should not be rounded."""
    only = load.stored_in(base)
    if only is None:
        return torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        try:
            get_peft_model(load.skeleton(str(base)), PeftConfig.from_pretrained(adapter))
        except (NotImplementedError, TrimtabError):  # torch's, where a value is asked of a shape; others are told later
            return torch.float32
    return only


def _expected(adapter: Path, source: Source, ids: list[list[int]], allow_pickle: bool) -> list[Tensor]:
    """What the adapter says on the base that it was trained on. It computes in float32, as the merged model does for the
    comparison, so that only the weights make a difference; 4-bit layers compute as in the run."""
    four_bit = source.load_in_4bit
    base = load.load_model(source.base, dtype=source.stored, load_in_4bit=four_bit, held=four_bit)
    model = PeftModel.from_pretrained(base, str(adapter), allow_pickle=allow_pickle).eval()
    return logits(model, ids) if four_bit else _logits(model, ids)


def _logits(model: Any, ids: list[list[int]]) -> list[Tensor]:
    with in_float32(model):
        return logits(model, ids)


def dense_base(source: Source) -> Any:
    """The base that was trained on, dense. What 4-bit codes stand for is a number of the run's own dtype."""
    dense = load.load_model(source.base, dtype=source.stored)
    if source.load_in_4bit:
        quantised = load.load_model(source.base, dtype=source.dtype, load_in_4bit=True)
        with torch.no_grad():
            for name, layer in quantised.named_modules():
                if isinstance(layer, nn.Linear) and not layer.weight.dtype.is_floating_point:
                    dense.get_submodule(name).weight.copy_(port(layer).weight())
    return dense


def _write(
    adapter: Path, source: Source, target: torch.dtype, tokenizer: Any, folder: Path, allow_pickle: bool
) -> bool:
    model: Any = PeftModel.from_pretrained(dense_base(source), str(adapter), allow_pickle=allow_pickle)
    streamed = stream.write(model, source.base, target, folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors lets nobody else read what it writes
    return streamed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def card(report: MergeReport) -> str:
    """The merged model's README: from what it was made, and how near it is to it."""
    d, four_bit = report.difference, ", in 4 bit as it was trained on" * report.load_in_4bit
    return (
        f"---\nlibrary_name: transformers\nbase_model: {json.dumps(report.base)}\ntags: [trimtab, merged]\n---\n\n"
        f"# {report.output_dir.name}\n\nThe adapter `{report.adapter}` merged into `{report.base}`{four_bit}: summed in "
        f"float32, rounded once to {report.dtype}.\n\nCompared with the adapter on its base before it was kept "
        f"(`{REPORT}` has the figures):\n\n"
        "| probes | positions | largest difference of a logit | mean difference | ... of the logits' spread | allowed "
        "| same first choice |\n|---|---|---|---|---|---|---|\n"
        f"| {d.probes} | {d.positions:,} | {d.maximum:.2g} | {d.mean:.2g} | {100 * d.relative:.2g} % "
        f"| {100 * report.tolerance:g} % | {100 * d.agreement:.1f} % |\n"
    )


def _bounded(report: MergeReport, console: Console) -> None:
    d = report.difference
    line = (
        f"logits differ by {d.maximum:.2g} at most, {d.mean:.2g} on average ({100 * d.relative:.2g} % of their spread; "
        f"allowed {100 * report.tolerance:g} %), same first choice at {100 * d.agreement:.1f} % of {d.positions:,}"
    )
    said = Text.assemble(("verified  ", "bold"), f"merged against adapter on {d.probes} probes: {line}")
    console.print(said, soft_wrap=True)
    if not d.relative <= report.tolerance:
        raise NotMergeable(
            f"the merged model is not the adapter: {line}. Nothing was written. "
            f"Is {report.base} the base it was trained on?"
        )

"""`trimtab merge`: the base that was trained on and the adapter as one plain model, compared before it is kept.

The sum is taken in float32 and rounded once, to the dtype that is written. A run on a 4-bit base was trained on the
weights that its codes stand for, so these, not the original ones, are what the adapter is added to.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from trimtab import origin
from trimtab.core.base import port
from trimtab.core.config import PeftConfig
from trimtab.data import Renderer
from trimtab.errors import ConfigError, NotMergeable, nearest
from trimtab.export.probes import KERNEL, TOLERANCE, Difference, compare, logits, probes
from trimtab.files import try_folder, write_text
from trimtab.model import PeftModel
from trimtab.train import load

REPORT = "merge_report.json"
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"output_dir": str(self.output_dir), "relative_difference": self.difference.relative}


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from: its base, and in which form the base was trained on."""

    base: Path
    load_in_4bit: bool
    dtype: torch.dtype  # that the run computed in; where no run is recorded, of the base's own weights


def merge(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    console: Console | None = None,
) -> MergeReport:
    """Write a plain transformers model (and tokenizer) to `output_dir`; raise `NotMergeable` where it differs from the
    adapter by more than rounding. `dtype` auto: what the run computed in (the base's own, where no run is recorded)."""
    adapter, out, console = Path(adapter_dir).expanduser(), Path(output_dir).expanduser(), console or Console()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"output_dir {str(out)!r} exists and is not empty: choose a new folder")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    try_folder(out, "output_dir")
    source = find_source(adapter, model)
    target = source.dtype if dtype == "auto" else getattr(torch, dtype)
    tokenizer = load.load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else source.base)
    ids = probes(adapter, Renderer(tokenizer))
    expected = logits(_adapted(adapter, source), ids)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(adapter, source, target, tokenizer, partial)
        found = compare(expected, logits(load.load_model(partial, dtype=torch.float32), ids))
        limit = TOLERANCE[target] + (KERNEL if source.load_in_4bit and source.dtype is not torch.float32 else 0)
        report = MergeReport(
            out, str(adapter), str(source.base), str(target).removeprefix("torch."), source.load_in_4bit, found, limit
        )
        _bounded(report, console)
        write_text(partial / REPORT, json.dumps(report.as_dict(), indent=2) + "\n")
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
    name = model or config.base_model_name_or_path or record.get("model")
    if not name:
        raise ConfigError(f"{adapter} does not say what its base is: --model FOLDER")
    base = load.model_folder(name)
    four_bit = bool(record.get("options", {}).get("load_in_4bit") or (origin.read(adapter) or {}).get("load_in_4bit"))
    if "dtype" in record:
        return Source(base, four_bit, getattr(torch, record["dtype"]))
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return Source(base, four_bit, getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32"))


def _record(adapter: Path) -> dict[str, Any]:
    path = adapter / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _adapted(adapter: Path, source: Source) -> Any:
    """The adapter on the base that it was trained on. It computes in float32, as the merged model does for the
    comparison, so that only the weights make a difference; 4-bit layers compute as in the run."""
    dtype = source.dtype if source.load_in_4bit else torch.float32
    base = load.load_model(source.base, dtype=dtype, load_in_4bit=source.load_in_4bit)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def dense_base(source: Source) -> Any:
    """The base that was trained on, dense and in float32."""
    dense = load.load_model(source.base, dtype=torch.float32)
    if source.load_in_4bit:
        quantised = load.load_model(source.base, dtype=source.dtype, load_in_4bit=True)
        with torch.no_grad():
            for name, layer in quantised.named_modules():
                if isinstance(layer, nn.Linear) and not layer.weight.dtype.is_floating_point:
                    dense.get_submodule(name).weight.copy_(port(layer).weight())
    return dense


def _write(adapter: Path, source: Source, target: torch.dtype, tokenizer: Any, folder: Path) -> None:
    model: Any = PeftModel.from_pretrained(dense_base(source), str(adapter))
    merged = model.merge_and_unload().to(target)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors lets nobody else read what it writes


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

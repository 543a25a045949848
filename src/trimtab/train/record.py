"""`run.json`: what was run, on what, with which result."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from trimtab.train.checkpoint import Counts
from trimtab.train.options import TrainOptions

PACKAGES = ("trimtab", "torch", "transformers", "accelerate", "safetensors", "bitsandbytes")


@dataclass
class Record:
    """The fields of `run.json`, in its order."""

    status: str  # running, completed, failed, interrupted
    model: str
    adapter: str
    seed: int
    dtype: str
    device: str
    trainable_parameters: int
    versions: dict[str, str] = field(default_factory=lambda: versions())
    steps: int = 0
    examples_seen: int = 0
    tokens_seen: int = 0
    tokens_computed: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    first_loss: float | None = None
    final_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    error: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def count(self, counts: Counts, steps: int, metrics: list[dict[str, Any]]) -> None:
        """Take over what a run has seen, and its first and last losses."""
        self.steps, self.examples_seen, self.tokens_seen = steps, counts.examples, counts.tokens
        self.tokens_computed, self.supervised_tokens = counts.computed, counts.supervised
        self.train_seconds = round(counts.seconds, 3)
        self.tokens_per_second = round(counts.tokens / counts.seconds, 1) if counts.seconds else 0.0
        self.peak_memory_bytes = peak_memory()
        losses = [line["loss"] for line in metrics if "loss" in line]
        self.first_loss, self.final_loss = (losses[0], losses[-1]) if losses else (None, None)

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str) + "\n"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Bytes at the worst moment so far: of the card where one computes, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plain(options: TrainOptions) -> dict[str, Any]:
    return asdict(options)

"""Texts that an adapter and its merged model must read alike, and how far apart their logits are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.data import Renderer

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "def add(a, b):",
)
LONGEST = 512  # tokens of a probe

# what the mean difference may be, as a share of the logits' own spread (their standard deviation). Rounding each weight
# once to bfloat16 was seen to move it by 0.7 to 1.6 %, a merge into the wrong weights by tens of percent
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
KERNEL = 4e-2  # 4-bit layers that compute in half precision round their inputs and sums too: 3 % was seen


@dataclass(frozen=True)
class Difference:
    """Merged against adapter, over all positions of all probes."""

    probes: int
    positions: int
    maximum: float
    mean: float
    spread: float  # the standard deviation of the adapter's logits
    agreement: float  # share of positions with the same most likely token

    @property
    def relative(self) -> float:
        return self.mean / self.spread if self.spread else self.mean


def probes(adapter_dir: Path, renderer: Renderer) -> list[list[int]]:
    """The fixed questions, and what the run's own samples asked and answered."""
    talks = [[{"role": "user", "content": text}] for text in QUESTIONS]
    ids = [renderer.prompt_ids(talk) for talk in talks]
    path = adapter_dir / "samples.jsonl"
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            sample: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(sample, dict) or not all(isinstance(sample.get(k), str) for k in ("prompt", "after")):
            continue
        head = renderer.prompt_ids([{"role": "user", "content": sample["prompt"]}])
        ids.append(head + renderer.tokenizer(sample["after"], add_special_tokens=False)["input_ids"])
    return [probe[:LONGEST] for probe in ids]


def logits(model: Any, ids: Sequence[list[int]]) -> list[Tensor]:
    """The logits of each probe's own tokens, float32 on the CPU, each read alone. Those of a prompt method's stand before."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(input_ids=torch.tensor([probe], device=device)).logits[0, -len(probe) :].float().cpu() for probe in ids]


def compare(adapter: Sequence[Tensor], merged: Sequence[Tensor]) -> Difference:
    a, b = torch.cat(list(adapter)), torch.cat(list(merged))  # (positions, vocabulary)
    apart = (a - b).abs()
    same = (a.argmax(-1) == b.argmax(-1)).float().mean()
    return Difference(
        len(adapter), len(a), apart.max().item(), apart.mean().item(), a.std().item(), round(same.item(), 4)
    )

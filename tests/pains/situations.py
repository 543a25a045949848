"""What the situations have in common: the tiny models, rows and tokenizers of the other tests, and a few words for them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

TESTS = Path(__file__).parents[1]
for folder in ("train", "model"):
    sys.path.append(str(TESTS / folder))
sys.path.append(str(TESTS))

import small_llama  # noqa: E402
import tiny_llama as tiny  # noqa: E402
from data import tiny as chats  # noqa: E402
from model_folder import write_model, write_rows  # noqa: E402
from small_llama import IDS, llama, logits, move  # noqa: E402

from trimtab import LoraConfig  # noqa: E402

__all__ = ["IDS", "Plain", "chats", "llama", "logits", "lora", "move", "ran", "small_llama", "tiny", "trainer", "write_model",
           "write_rows"]  # fmt: skip


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]} | more)


def trainer(folder: Path, model: Any, rows: list[Any] | None = None, **over: Any) -> Any:
    """Padded batches, three steps."""
    from trimtab import Trainer

    return Trainer(
        model=model, args=tiny.arguments(folder, **{"max_steps": 3} | over), data_collator=tiny.collate,
        train_dataset=tiny.rows(24) if rows is None else rows,
    )  # fmt: skip


def ran(model: Path, rows: Path, out: Path, **over: Any) -> tuple[Any, str]:
    """`trimtab train` of a few steps: its result, and what it printed."""
    from trimtab.train.options import TrainOptions
    from trimtab.train.run import run

    said = io.StringIO()
    given: dict[str, Any] = dict(
        model=str(model), dataset=[str(rows)], output_dir=str(out), batch_size=8, max_steps=3, learning_rate=1e-2, dtype="float32"
    )
    return run(TrainOptions(**given | over), console=Console(file=said, width=300)), said.getvalue()


class Plain(nn.Module):
    """Layers that stand in no transformer, called in turn."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x

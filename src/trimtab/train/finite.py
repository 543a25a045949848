"""A step whose loss or gradient is not finite is not taken; its rows are named; too many in a row end the run."""

# pyright: reportPrivateUsage=false
# (transformers' Trainer offers what a subclass needs under names with an underscore)
from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import TrainingError, TrimtabWarning

IN_A_ROW = 3  # steps, unless the user says otherwise


@dataclass
class SkipCounts:
    """Steps that were not taken: up to now without one between that was, and in all."""

    in_a_row: int = 0
    steps: int = 0


class Skipped:
    """What is known of the step at hand, and how many were not taken."""

    def __init__(self, limit: int = IN_A_ROW) -> None:
        self.limit, self.counts = limit, SkipCounts()
        self.rows: list[str] = []  # of the step at hand, `file:line`
        self.bad: dict[str, None] = {}  # those of them whose loss is not finite
        self.now = False  # whether the step at hand is not taken
        self.named: list[str] = []  # the rows of the last one that was not
        self._loss: Tensor | None = None

    def begin(self, trainer: Any) -> None:
        self.rows, self.bad, self.now = [], {}, False
        self._loss = trainer._tr_loss.clone()

    def look(self, losses: Tensor, rows: list[str]) -> None:
        """Note the rows of a forward pass whose loss is not finite."""
        self.bad |= dict.fromkeys(broken(losses, rows))

    def judge(self, trainer: Any, model: nn.Module, norm: Any) -> Any:
        """The gradient's norm, where the step may be taken; else None, without a gradient no tensor is touched."""
        unscaled = trainer.accelerator.scaler is None  # a float16 scaler meets such gradients while it looks for its scale
        wrong = norm is not None and unscaled and not bool(torch.isfinite(torch.as_tensor(norm)))
        self.now = _anywhere(trainer, bool(self.bad) or wrong)
        if not self.now:
            self.counts.in_a_row = 0
            return norm
        self.counts.in_a_row += 1
        self.counts.steps += 1
        self.named = list(self.bad) or self.rows
        where = f"step {trainer.state.global_step + 1}: "
        if self.bad:
            what = f"{where}the loss is not finite for {some(self.bad)} ({len(self.bad)} of the step's {len(self.rows)} rows)"
        else:
            what = f"{where}the gradient's norm is {float(norm or 0)} over the rows {some(self.rows)}"
        if self.counts.in_a_row >= self.limit or trainer.is_deepspeed_enabled:  # which has taken the step by now
            times = f"; {self.counts.in_a_row} such steps in a row" if self.counts.in_a_row > 1 else ""
            raise TrainingError(
                f"{what}{times}. No step was taken, and nothing was saved. Where all rows are hit, lower the learning rate "
                f"or use float32; where few are, look at them"
            )
        for p in model.parameters():
            p.grad = None
        assert self._loss is not None
        trainer._tr_loss = self._loss  # means over steps are over those that were taken
        trainer._globalstep_last_logged += 1
        trainer._initial_global_step += 1
        tally = f"{self.counts.in_a_row} of {self.limit} in a row end the run"
        warnings.warn(f"{what}; the step is not taken ({tally})", TrimtabWarning)
        return None


def broken(losses: Tensor, rows: list[str]) -> list[str]:
    """The rows whose loss is not finite."""
    good = losses.detach().isfinite().tolist()
    return [row for row, fine in zip(rows, good, strict=True) if not fine]


def some(rows: Any) -> str:
    rows = list(rows)
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


def _anywhere(trainer: Any, here: bool) -> bool:
    """Whether it is so on any rank: all of them take a step, or none."""
    if trainer.accelerator.num_processes == 1:
        return here
    flag = torch.tensor(float(here), device=trainer.args.device)
    return bool(trainer.accelerator.reduce(flag, "sum") > 0)

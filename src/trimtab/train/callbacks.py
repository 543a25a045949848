"""What a run shows while it trains: a progress bar, or plain lines where there is no terminal, and `metrics.jsonl`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.files import write_text

STEP = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch")
EVAL = ("eval_loss", "eval_supervised_tokens", "epoch")
SKIPPED = ("skipped_rows", "epoch")
LINES = 20  # about so many lines a run where there is no terminal


class MetricsFile(TrainerCallback):
    """One JSON line for each logged step and each evaluation, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:  # a resumed run writes the steps after its checkpoint anew
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step > 0]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        names = STEP if "loss" in logs else EVAL if "eval_loss" in logs else SKIPPED if "skipped_rows" in logs else None
        if names and state.is_world_process_zero:
            line = {"step": state.global_step} | {name: logs[name] for name in names if name in logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` up to one that a kill, or a machine that went off, left broken."""
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for line in whole:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class ProgressBar(TrainerCallback):
    """Steps, loss, tokens per second and the time that is left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.start, self.first = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start, self.first = time.monotonic(), state.global_step
        if self.console.is_terminal:
            shown = TextColumn("{task.fields[shown]}")
            columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), shown]
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self.bar.add_task("train", total=state.max_steps, completed=state.global_step, shown="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        step, last = state.global_step, state.max_steps
        if "eval_loss" in logs:
            self.console.print(f"step {step}/{last}: validation loss {logs['eval_loss']:.4f}", highlight=False)
        elif "loss" in logs:
            shown = f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s"
            if self.bar:
                self.bar.update(self.bar.task_ids[0], shown=shown)
            elif step == last or step == 1 or step % max(1, last // LINES) == 0:
                done = max(step - self.first, 1)
                left = (time.monotonic() - self.start) / done * (last - step)
                self.console.print(f"step {step}/{last}: {shown}  {clock(left)} left", highlight=False)

    def close(self) -> None:
        """Give the terminal back, however the run ended."""
        if self.bar:
            self.bar.stop()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

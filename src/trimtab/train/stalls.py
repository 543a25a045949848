"""A run that stands still says where: the stacks of all its threads in a file, and one line. It goes on if it can."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Watch(TrainerCallback):
    """While it is entered, a thread sleeps until `seconds` have passed in which no step, no micro-batch and no batch of an
    evaluation was done; it wakes about once in that time. Each stall is told once, by every rank for itself. 0: no thread."""

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self.file, self.rank, self.seconds = folder / f"stalled-rank{rank}.txt", rank, seconds
        self.step, self.phase, self.beat = 0, "", 0.0
        self._over, self._thread = threading.Event(), threading.Thread()

    # ---- what the run says of itself

    def __enter__(self) -> None:
        self._now("before its first step")
        if self.seconds:
            self._over = threading.Event()
            # a daemon: it must not keep a process that has nothing else to do
            self._thread = threading.Thread(target=self._watch, args=(self._over,), name="trimtab stalls", daemon=True)
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """A phase that is no step and may take long."""
        before = self.phase
        self._now(f"in {what} after step {self.step}")
        try:
            yield
        finally:
            self._now(before)

    def _now(self, phase: str) -> None:
        self.phase, self.beat = phase, time.monotonic()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._now(f"in step {state.global_step + 1}")

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._now(self.phase)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step
        self._now(f"between steps, after step {self.step}")

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._now(self.phase)

    # ---- the thread

    def _watch(self, over: threading.Event) -> None:
        told, wait = None, self.seconds
        while not over.wait(wait):
            beat = self.beat
            left = beat + self.seconds - time.monotonic()
            if left <= 0 and beat != told:
                told = beat
                self._tell(self.seconds - left)
            wait = left if left > 0 else self.seconds

    def _tell(self, seconds: float) -> None:
        line = f"rank {self.rank} stands still, {self.phase}: nothing was done for {seconds:,.1f} s"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
                file.flush()  # what follows is written past Python's buffer
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            line += f"; where its threads are is in {self.file} (--stall_seconds {self.seconds:g})"
        except OSError as error:
            line += f"; {self.file} could not be written: {error}"
        print(line, file=sys.stderr, flush=True)

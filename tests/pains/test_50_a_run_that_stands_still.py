"""A run that hangs: where it stands is printed and written, once a stall, and it goes on if what held it lets go."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from situations import ran, tiny, write_model, write_rows

from trimtab import Trainer
from trimtab.errors import ConfigError
from trimtab.train import saving

SECONDS = 0.2
PATIENCE = 60.0  # the test's own: a stall that is never told is a failure, not a hang


def stalls(file: Path, phase: str) -> list[str]:
    """What the file says of a phase."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [part for part in re.split(r"(?m)^(?=\d{4}-)", text) if f", {phase}:" in part]


def stand_still(made: Trainer, phase: str) -> None:
    """Until that is told, and then for as long again: a machine that is busy only makes it longer."""
    file, watch = made.watch.file, made.watch
    watch._now(watch.phase)  # what a busy machine took until here is another stall
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not any("stand_still" in part for part in stalls(file, phase)):
        time.sleep(0.01)
    time.sleep(2.2 * SECONDS)


def trainer(folder: Path, collate: Callable[[list[Any]], Any] = tiny.collate, seconds: float = SECONDS, **over: Any) -> Trainer:
    args = tiny.arguments(folder, max_steps=3, gradient_accumulation_steps=1, **over)
    return Trainer(model=tiny.adapted(r=2), args=args, data_collator=collate, train_dataset=tiny.rows(12),
                   eval_dataset=tiny.rows(4), stall_seconds=seconds)  # fmt: skip


@pytest.mark.parametrize(("steps", "phase"), [(0, "before its first step"), (1, "between steps, after step 1")])
def test_a_collator_that_sleeps(tmp_path: Path, capfd: pytest.CaptureFixture[str], steps: int, phase: str) -> None:
    file, held = tmp_path / "out" / "stalled-rank0.txt", []

    def sleepy(examples: list[Any]) -> Any:
        if made.state.global_step == steps and not held:
            held.append(True)
            stand_still(made, phase)
        return tiny.collate(examples)

    made = trainer(tmp_path / "out", sleepy)
    made.train()
    (said,) = [part for part in stalls(file, phase) if "in sleepy" in part]
    assert f"rank 0 stands still, {phase}: nothing was done for " in said and "in get_batch_samples" in said
    lines = [line for line in capfd.readouterr().err.split("\n") if f", {phase}:" in line]
    assert len(lines) == len(stalls(file, phase)) and str(file) in lines[0] and "--stall_seconds 0.2" in lines[0]
    assert made.state.global_step == 3, "it went on"


def test_what_takes_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step, an evaluation and a save, one after the other; none of them is called another."""
    file, held = tmp_path / "stalled-rank0.txt", set()
    made = trainer(tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2)

    def slow(where: Any, name: str, step: int, phase: str) -> None:
        do = getattr(where, name)

        def slowly(*args: Any, **kwargs: Any) -> Any:
            if made.state.global_step == step and phase not in held:
                held.add(phase)
                stand_still(made, phase)
            return do(*args, **kwargs)

        monkeypatch.setattr(where, name, slowly)

    slow(made, "training_step", 1, "in step 2")
    slow(made, "_evaluated", 2, "in an evaluation after step 2")
    slow(saving, "save", 2, "in a save after step 2")
    made.train()
    for phase in held:
        assert sum("in stand_still" in part for part in stalls(file, phase)) == 1, phase
    assert len(held) == 3 and file.read_text(encoding="utf-8").count("in stand_still") == 3
    assert (tmp_path / "checkpoint-2").is_dir() and made.state.global_step == 3


def test_it_ends_with_the_run_however_that_ends(tmp_path: Path) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "trimtab stalls"]

    seen: list[int] = []

    def counts(examples: list[Any]) -> Any:
        seen.append(len(threads()))
        if len(seen) > 2:
            raise KeyboardInterrupt
        return tiny.collate(examples)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, counts, seconds=PATIENCE).train()
    assert seen == [1, 1, 1] and not threads()
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, counts, seconds=0).train()
    assert seen == [0, 0, 0], "0 watches nothing"
    assert not (tmp_path / "stalled-rank0.txt").exists()


def test_it_costs_nothing(tmp_path: Path) -> None:
    """Its thread wakes about once in the time it waits, however many steps are done."""
    watch, woken = trainer(tmp_path, seconds=0.2).watch, 0
    with watch:
        over = watch._over
        wait = over.wait

        def counted(timeout: float | None = None) -> bool:
            nonlocal woken
            woken += 1
            return wait(timeout)

        over.wait = counted  # type: ignore[method-assign]
        end = time.monotonic() + 1.1
        while time.monotonic() < end:
            watch._now("in step 1")
            time.sleep(0.001)
    assert woken <= 7


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="stall_seconds is -1; it must be at least 0"):
        ran(model, rows, tmp_path / "out", stall_seconds=-1)
    ran(model, rows, tmp_path / "out", stall_seconds=1e-3, max_steps=1)
    assert stalls(tmp_path / "out" / "stalled-rank0.txt", "before its first step")

"""A checkpoint is there whole or not at all, whatever happens while it is written, replaced or removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_llama as tiny
import torch
from packed_runs import stemmed, trained
from test_checkpoints import run

from trimtab.errors import BadCheckpoint, ConfigError, TrainingError, TrimtabWarning
from trimtab.train import checkpoint, saving
from trimtab.train.trainer import Trainer


class Full:
    """Counts the calls of `os.fsync` and of `os.replace`, and lets the n-th fail, as on a disk that is full by then."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call


class Killed(BaseException):
    """What no handler of the library may turn into something else."""


def saved(folder: Path) -> Trainer:
    """A run that holds two checkpoints, of steps 2 and 4."""
    return run(folder, max_steps=4)


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: at each file that is brought to the disk, in turn."""
    trainer, at, failed = saved(tmp_path), 1, 0
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    while True:
        trainer.state.global_step = 5
        full = Full(at)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full(os.fsync))
            try:
                saving.save(trainer, None)
                break
            except TrainingError as error:
                text = str(error)
        assert "No space left on device" in text and "is whole. Fix: make room" in text
        now = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        assert before.items() <= now.items(), at
        if "checkpoint-5 is whole" in text:  # it has its name, but the folder's entry may not last: so nothing may go yet
            assert checkpoint.damage(tmp_path / "checkpoint-5") is None
            shutil.rmtree(tmp_path / "checkpoint-5")
        else:
            assert "checkpoint-4 is whole" in text and now == before, at
        at, failed = at + 1, failed + 1
    assert failed > 8 and full.calls < at
    assert [f.name for f in checkpoint.steps(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_a_run_on_a_full_disk_says_so_and_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", max_steps=8)
    write, calls = checkpoint.write_tensors, [0]

    def full(*args: Any) -> None:
        calls[0] += 1
        if calls[0] > 4:  # two files each: the third checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"checkpoint-6 could not be written .No space"):
        patch.setattr(checkpoint, "write_tensors", full)
        run(tmp_path / "part", max_steps=8)
    resumed = run(tmp_path / "part", max_steps=8, resume=checkpoint.to_resume("last", tmp_path / "part"))
    assert tiny.losses(resumed) == tiny.losses(whole)


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[str]]:
    """Ends at the n-th change of a folder: a rename or the removal of one."""
    done: list[str] = []

    def counted(real: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) == at:
                raise Killed
            done.append(f"{name} {args[0]}")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename, "rename"))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree, "remove"))
        yield done


@pytest.mark.parametrize("step", [4, 6])  # one that replaces a checkpoint of its name, and a new one
def test_a_kill_between_renames_leaves_the_newest_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    saved(tmp_path / "start")
    for at in range(20):
        folder = Path(shutil.copytree(tmp_path / "start", tmp_path / str(at)))
        finished = Path(shutil.copytree(folder / "checkpoint-4", folder / f".checkpoint-{step}.partial"))
        complete = False
        with killed_at(monkeypatch, at):
            try:
                checkpoint.put_in_place(finished, folder / f"checkpoint-{step}")
                checkpoint.retain(folder, 2, folder / f"checkpoint-{step}")
                complete = True
            except Killed:
                pass
        newest = checkpoint.to_resume("last", folder)
        assert newest.name in ({"checkpoint-4", "checkpoint-6"} if step == 6 else {"checkpoint-4"}), at
        assert checkpoint.damage(newest) is None
        if complete:
            assert at > 2 and newest.name == f"checkpoint-{step}" and len(checkpoint.steps(folder)) == 2
            assert not [f for f in folder.iterdir() if f.name.startswith(".")]
            return
    raise AssertionError("it never came to its end")


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "checkpoint-4" / "optimizer.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1])  # cut off: not even counted
    assert [f.name for f in checkpoint.steps(tmp_path)] == ["checkpoint-2"]
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # one bit
    with pytest.warns(TrimtabWarning, match="checkpoint-4 is passed over: optimizer.safetensors is damaged"):
        assert checkpoint.to_resume("last", tmp_path).name == "checkpoint-2"
    with pytest.raises(ConfigError, match=r"optimizer.safetensors is damaged"):
        checkpoint.to_resume(str(tmp_path / "checkpoint-4"), tmp_path)


def test_a_disk_that_returns_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint.load_file

    def flipped(path: Path) -> dict[str, torch.Tensor]:
        found = read(path)
        tensor = next(iter(found.values()))
        tensor.view(-1)[0] += 1
        return found

    monkeypatch.setattr(checkpoint, "load_file", flipped)
    with pytest.raises(BadCheckpoint, match="reads back differently"):
        saved(tmp_path)
    assert not list(tmp_path.glob("*checkpoint-*"))


def test_the_limit_keeps_the_last_good_one(tmp_path: Path) -> None:
    """Also where an earlier run left checkpoints of higher numbers, and where the newest ones are damaged."""
    saved(tmp_path)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-90")
    run(tmp_path, max_steps=6, save_total_limit=1)
    assert (tmp_path / "checkpoint-6").is_dir() and checkpoint.damage(tmp_path / "checkpoint-6") is None
    for name in ("checkpoint-7", "checkpoint-8"):
        shutil.copytree(tmp_path / "checkpoint-6", tmp_path / name)
        (tmp_path / name / "trainable.safetensors").unlink()
    checkpoint.retain(tmp_path, 1, None)
    assert [f.name for f in checkpoint.steps(tmp_path)] == ["checkpoint-6"]
    checkpoint.retain(tmp_path, None, None)
    assert (tmp_path / "checkpoint-7").is_dir(), "what is not whole is not ours to remove"


def test_the_optimizer_is_saved_by_name(tmp_path: Path) -> None:
    trainer = trained(tmp_path, stemmed(16), max_steps=2, save_strategy="steps", save_steps=2)
    names = set(tiny.tensors(trainer.accelerator.unwrap_model(trainer.model)))
    tensors = checkpoint.read_tensors(tmp_path / "checkpoint-2" / saving.OPTIMIZER)
    assert {key.rpartition("/")[0] for key in tensors} == names
    assert {key.rpartition("/")[2] for key in tensors} == {"exp_avg", "exp_avg_sq", "step"}
    groups = json.loads((tmp_path / "checkpoint-2" / checkpoint.RECORD).read_text())["optimizer"]["groups"]
    assert {name for group in groups for name in group["params"]} == names
    pickles = [f.name for f in (tmp_path / "checkpoint-2").iterdir() if f.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert pickles == []

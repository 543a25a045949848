"""Real kills of a real run; `bench/kill_resume.py` does two hundred of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_killed_runs_end_as_the_one_that_was_not() -> None:
    command = [sys.executable, str(BENCH / "kill_resume.py"), "--kills", "4", "--per_run", "2", "--methods", "lora,adalora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "every run identical" in done.stdout
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert [rows[name][1] for name in ("lora", "adalora", "all")] == ["2", "2", "4"]


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import kill_resume

    whole = tmp_path / "whole"
    for step in (kill_resume.STEPS - 2, kill_resume.STEPS):
        for name in kill_resume.COMPARED:
            file = whole / f"checkpoint-{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"0123")
    (whole / kill_resume.COMPARED[2]).write_bytes(b"0123")
    (whole / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    assert kill_resume.differences(other, whole) == []
    (other / "checkpoint-12" / "optimizer.safetensors").write_bytes(b"0124")
    (other / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5000001}) + "\n")
    (other / ".checkpoint-4.gone").mkdir()
    found = kill_resume.differences(other, whole)
    assert found[:2] == ["optimizer.safetensors differs", "losses differ, first (1, 0.5000001)"]
    assert len(found) == 3 and ".checkpoint-4.gone" in found[2]

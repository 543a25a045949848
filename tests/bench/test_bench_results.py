"""An interrupted bench goes on; a changed one begins anew and keeps the old figures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from machine import Others, _seconds, code, machine
from results import Results

HEADER: dict[str, Any] = {"code": "abc", "settings": {"threads": 2}, "machine": {"cpu": "x"}}


def cell(**over: Any) -> dict[str, Any]:
    return {"work": "short", "contender": "trimtab", "rows": 64, "round": 0, "tokens_per_second": 10.0} | over


def begun(path: Path, header: dict[str, Any] = HEADER, **more: Any) -> tuple[Results, str | None]:
    results = Results(path)
    return results, results.open(header, "python bench/run.py", **more)


def test_finished_cells_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"
    first, said = begun(path)
    assert said is None
    first.add(cell())
    first.add(cell(round=1))
    again, said = begun(path)
    assert said is not None and said.startswith("going on with 2 results of ")
    assert again.cells == first.cells
    assert again.has(cell(round=1)) and not again.has(cell(round=2))
    assert not again.has(cell(rows=128)) and not again.has(cell(contender="tutorial"))
    assert again.header["started"] == first.header["started"]
    assert again.commands == ["python bench/run.py"]


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, _ = begun(path)
    first.add(cell())
    first.add({"work": "short", "contender": "tutorial", "rows": 64, "round": 0, "failed": "out of memory"})
    assert first.has(cell(contender="tutorial"))  # not in the same bench
    assert begun(path)[0].cells == [cell()]
    assert len(Results(path).cells) == 2  # a report shows that it failed


def test_a_line_cut_short_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, _ = begun(path)
    first.add(cell())
    with path.open("a") as file:
        file.write('{"work": "short", "cont')
    again, _ = begun(path)
    again.add(cell(round=1))
    assert [c["round"] for c in Results(path).cells] == [0, 1]


def test_results_of_other_code_are_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    begun(path)[0].add(cell())
    changed, said = begun(path, HEADER | {"code": "xyz"})
    assert said == "earlier results (another code) are kept in results-1.jsonl"
    assert changed.cells == [] and changed.header["code"] == "xyz"
    assert Results(tmp_path / "results-1.jsonl").cells == [cell()]
    _, said = begun(path, HEADER | {"code": "xyz"}, fresh=True)
    assert said == "earlier results (as asked) are kept in results-2.jsonl"


def test_the_header_survives_a_round_through_json(tmp_path: Path) -> None:
    """A tuple or a float that changed its type in the file would set every resumed bench aside."""
    header = {"machine": machine(), "code": code()}
    assert json.loads(json.dumps(header)) == header


def test_own_work_is_not_taken_for_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 core-seconds were busy in 10 s, 13 of them ours."""
    clocks = iter([(100.0, 5.0, 0.0), (120.0, 18.0, 10.0)])
    monkeypatch.setattr("machine._seconds", lambda: next(clocks))
    with Others() as others:
        pass
    assert others.cores == 0.7


def test_clocks_of_the_machine_are_read_where_there_are_any() -> None:
    before = _seconds()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    after = _seconds()
    assert (before is None) == (not Path("/proc/stat").exists())
    if before is not None and after is not None:
        busy, own, passed = (now - then for now, then in zip(after, before, strict=True))
        assert 0.15 < own < busy + 0.1 and passed >= own - 0.05

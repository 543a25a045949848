"""The pure parts of bench/methods.py: the rows, the choice of a learning rate, what is run again, the table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import methods as bench
from learning import choose, failures, finals, picture, size, table

HEADER: dict[str, Any] = {
    "machine": {"cpu": "x", "cores": 2, "bf16": "none that is known", "system": "y"},
    "versions": {"torch": "2"},
}


def line(method: str = "lora", stage: str = "final", rate: float = 3e-3, **over: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "method": method, "stage": stage, "rate": rate, "epochs": 4 if stage == "final" else 1, "rows": 1000, "val": 100,
        "test": 200, "batch_size": 16, "model": "m", "val_loss": 0.5, "trainable_parameters": 1234, "adapter_bytes": 3 << 20,
        "tokens_per_second": 1000.4, "peak_memory_bytes": 3 << 30, "others_cores": 0.1, "steps": 63,
    }  # fmt: skip
    if stage == "final":
        found |= {"exact_match": 0.615, "loss": 0.25}
    return found | over


def test_no_row_is_in_two_parts_and_the_same_are_drawn_each_time() -> None:
    rows = list(range(50))
    parts = bench.split(rows, 20, 5, 10)
    assert [len(p) for p in parts] == [20, 5, 10] and len({r for p in parts for r in p}) == 35
    assert bench.split(rows, 20, 5, 10) == parts and parts[0] != rows[:20]
    with pytest.raises(SystemExit, match="60 rows are needed, and the file has 50"):
        bench.split(rows, 40, 20)


def test_the_rate_with_the_lowest_validation_loss_is_chosen() -> None:
    tried = [line(stage="search", rate=r, val_loss=v) for r, v in ((1e-3, 0.5), (1e-2, 0.3), (1e-1, float("nan")))]
    assert choose(tried) == 1e-2
    assert choose([{"rate": 1.0, "failed": "out of memory"}, tried[0]]) == 1e-3
    assert choose([{"rate": 1.0, "failed": "out of memory"}]) is None


def test_rates_and_names() -> None:
    assert bench.rates("lora", None) == list(bench.RATES) and bench.rates("lora", "1,2e-1,3") == [1, 0.2, 3]
    assert len(bench.rates("prompt_tuning", None)) == 3 and min(bench.rates("prompt_tuning", None)) > max(bench.RATES) / 2
    assert bench.names("oft,lora") == ["oft", "lora"]
    assert {"base", "lora", "dora", "prompt_tuning"} <= set(bench.names(None))
    with pytest.raises(SystemExit, match="loro"):
        bench.names("loro")


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"input": "{i}", "output": "x"}}\n' for i in range(20)))
    a = argparse.Namespace(
        model=tmp_path / "model", data=data, rows=10, val=4, test=6, epochs=2.0, search_epochs=1.0, rates="1,2,3",
        batch_size=4, threads=1, output_dir=tmp_path / "out",
    )  # fmt: skip
    ran: list[tuple[str, float]] = []

    def process(self: Any, key: dict[str, Any]) -> dict[str, Any]:
        ran.append((key["stage"], key["rate"]))
        if key["rate"] == 3:
            return {"failed": "the loss is not finite"}
        return {"val_loss": 1 / key["rate"]} | ({"exact_match": 0.5} if key["stage"] == "final" else {})

    monkeypatch.setattr(bench.Bench, "_process", process)
    first = bench.Bench(a)
    first.run("lora")
    assert ran == [("search", 1), ("search", 2), ("search", 3), ("final", 2)]
    first.run("lora")
    assert len(ran) == 4
    bench.Bench(a).run("lora")
    assert ran[4:] == [("search", 3)]  # what failed is tried once more
    a.epochs = 3.0
    bench.Bench(a).run("lora")
    assert ran[5:] == [("search", 3), ("final", 2)]


def test_table_and_picture(tmp_path: Path) -> None:
    lines = [
        line("base", rate=0.0, exact_match=0.005, loss=3.0, val_loss=3.0),
        *(line("lora", "search", r, val_loss=v) for r, v in ((5e-4, 0.6), (3e-3, 0.4), (2e-2, 2.0))),
        *(line("ia3", "search", r, val_loss=v) for r, v in ((5e-4, 0.9), (3e-3, 0.8), (2e-2, 0.7))),
        line("lora"),
        line("ia3", rate=2e-2, exact_match=0.7, adapter_bytes=300),
        {"method": "arrow", "stage": "search", "rate": 1.0, "epochs": 1, "rows": 1000, "failed": "needs adapters"},
    ]
    assert [e["method"] for e in finals(lines)] == ["ia3", "lora", "base"]
    assert failures(lines) == {"arrow": "needs adapters"}
    text = table(lines, HEADER)
    want = "| lora | 61.5 % | 0.250 | 63 x 16 | 1,234 | 3.0 MB | 1,000 | 3.0 GB | 0.003 | 0.0005: 0.600, 0.003: 0.400, "
    want += "0.02: 2.000 |"
    assert want in text and "| 0.3 KB | 1,000 | 3.0 GB | 0.02 ↑ |" in text
    assert "| *the model untouched* | 0.5 % | 3.000 |" in text
    assert "- arrow: needs adapters" in text and "after 1 epoch;" in text
    assert "No run is done." in table([], HEADER)
    picture(lines, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes()[:4] == b"\x89PNG"
    assert size(2048) == "2.0 KB"

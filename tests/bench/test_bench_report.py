"""The table says what the cells say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flops import share_of_peak, sizes
from losses import compare
from report import entries, lagging, picture, spread, table
from run import command_line

HEADER: dict[str, Any] = {
    "started": "2026-01-02 03:04",
    "machine": {"cpu": "Some CPU", "cores": 2, "bf16": "AMX", "memory_bytes": 2**34, "system": "Linux"},
    "versions": {"torch": "2.0"},
    "code": "abc",
    "card": None,
    "settings": {
        "dtype": "bfloat16",
        "model": "Small", "sizes": {"linear": 100, "head": 50}, "batch_size": 16, "learning_rate": 1e-3, "threads": 2,
    },
}  # fmt: skip


def cell(contender: str, speed: float, turn: int = 0, work: str = "short", **over: Any) -> dict[str, Any]:
    kind = contender.split(",")[0].split(" ")[0]
    figures = {"tokens": 1000, "tokens_per_second": speed, "peak_memory_bytes": 2**30, "losses": [2.0, 1.5, 1.0]}
    return {"work": work, "contender": contender, "kind": kind, "rows": 64, "round": turn} | figures | over


def ours(speed: float, turn: int = 0, **over: Any) -> dict[str, Any]:
    known = {"tokens_computed": 500, "supervised_tokens": 100, "matmul_peak": 1e6}
    return cell("trimtab", speed, turn, **known | {"steady_tokens_per_second": 2 * speed} | over)


CELLS = [
    ours(1000.0),
    cell("peft_trainer, micro-batch 4", 200.0),
    cell("peft_trainer, micro-batch 8", 150.0),
    cell("tutorial", 10.0),
    ours(1200.0, 1),
    cell("peft_trainer, micro-batch 4", 100.0, 1),
    cell("tutorial", 20.0, 1),
]


def cells_of(text: str, contender: str) -> list[str]:
    line = next(line for line in text.split("\n") if line.startswith("| short |") and contender in line)
    return [part.strip() for part in line.strip("|").split("|")]


def test_ratios_are_taken_inside_a_round() -> None:
    text = table(HEADER, ["python bench/run.py"], CELLS, [])
    assert cells_of(text, "trimtab") == [
        "short", "**trimtab**", "64", "2", "1,100 (1,000 - 1,200)", "2,200 (2,000 - 2,400)", "8.50 (5.00 - 12.00)",
        "80.0 (60.0 - 100.0)", "1.0 GB", "0.50", "48 (44 - 53) %", "2.0000", "1.0000",
    ]  # fmt: skip
    assert cells_of(text, "micro-batch 4")[6:8] == ["1", "12.5 (5.0 - 20.0)"]
    assert cells_of(text, "micro-batch 8")[3:7] == ["1", "150", "", "0.75"]
    assert cells_of(text, "tutorial")[7] == "1"


def test_the_table_says_where_and_how_it_was_measured() -> None:
    text = table(HEADER, ["python bench/run.py --works short"], [c | {"others_cores": 0.1} for c in CELLS], [])
    for part in (
        "begun 2026-01-02 03:04\n- `python bench/run.py --works short`\n",
        "Some CPU, 2 cores, bf16 units: AMX, 16 GB",
        "torch 2.0; trimtab's sources abc",
        "Small, LoRA r=8 on all linear layers, bfloat16, 16 examples a step, learning rate 0.001, 2 threads",
        "other programs used meanwhile: 0.10 (0.10 - 0.10)",
    ):
        assert part in text


def test_the_command_is_shown_without_folders() -> None:
    typed = "--works short --data /home/me/rows --out=/home/me/table.md --repeats 1 --model m --fresh".split()
    assert command_line(typed) == "python bench/run.py --works short --repeats 1 --fresh"


def test_a_contender_that_failed_is_in_the_table_and_not_run_again() -> None:
    failed = {"work": "short", "contender": "peft_trainer, micro-batch 16", "kind": "peft_trainer", "rows": 64}
    cells = [*CELLS[:4], failed | {"round": 0, "failed": "out of memory"}]
    assert cells_of(table(HEADER, [], cells, []), "micro-batch 16")[4] == "failed: out of memory"
    assert lagging(cells, "short") == {"peft_trainer, micro-batch 8", "peft_trainer, micro-batch 16"}
    assert lagging(cells, "alpaca") == set()


def test_without_peers_there_are_no_ratios() -> None:
    row = cells_of(table(HEADER, [], [ours(1000.0, steady_tokens_per_second=None)], []), "trimtab")
    assert row[4:8] == ["1,000", "", "", ""]


def test_works_stand_in_their_own_order() -> None:
    mixed = [cell("trimtab", 1.0, work="gsm8k"), cell("trimtab", 2.0, work="short")]
    assert [e.work for e in entries(mixed)] == ["short", "gsm8k"]


def test_the_last_loss_comparison_of_this_code_is_shown() -> None:
    line = {"work": "short", "dtype": "float32", "steps": 10, "batch_size": 16, "ours": [1.0], "theirs": [1.0]}
    lines = [line | {"code": "abc", "said": said} for said in ("first", "second")] + [
        line | {"code": "z", "said": "old"}
    ]
    text = table(HEADER, [], CELLS, lines)
    assert "second" in text and "first |" not in text and "old" not in text
    assert "The same losses" not in table(HEADER, [], CELLS, lines[2:])


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([5.0], "5"), ([5.0, 1.0, 3000.0], "5 (1 - 3,000)"), ([1.0, 2.0], "2 (1 - 2)")]
)
def test_a_spread(values: list[float], text: str) -> None:
    assert spread(values, ",.0f") == text


def test_the_share_of_the_matmul_peak() -> None:
    """(4 x 100 + 4 x 50 x 1/5) FLOPs x 2000 tokens/s x 1/2 computed each = 440,000 of 1,000,000 FLOP/s."""
    assert share_of_peak(ours(1000.0), {"linear": 100, "head": 50}) == pytest.approx(0.44)
    assert share_of_peak(cell("tutorial", 10.0), {"linear": 100, "head": 50}) is None


def test_sizes_are_those_of_the_stored_tensors(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "model.embed_tokens.weight": torch.zeros(11, 4),
        "lm_head.weight": torch.zeros(11, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4),
        "model.layers.0.mlp.up_proj.bias": torch.zeros(6),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 4, "vocab_size": 11}')
    assert sizes(tmp_path) == {"linear": 40, "head": 44}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    picture(HEADER, [*CELLS, ours(5.0, work="gsm8k")], tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("ours", "theirs", "each", "agree"),
    [
        ([2.0, 1.0], [2.00009, 1.0], True, True),
        ([2.0, 1.0], [2.00011, 1.0], True, False),
        ([2.0, 1.0], [2.0], True, False),
        ([9.0] + [1.0] * 20, [5.0] + [1.009] * 20, False, True),
        ([9.0] + [1.0] * 20, [9.0] + [1.011] * 20, False, False),
    ],
)
def test_when_losses_agree(ours: list[float], theirs: list[float], each: bool, agree: bool) -> None:
    assert compare(ours, theirs, each=each)[0] is agree

"""Command lines, outcomes of processes, and figures read from what they leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contenders import (
    Contender,
    Job,
    RunFailed,
    lineup,
    make_adapter,
    measure,
    our_command,
    our_figures,
    peer_command,
    reason,
    steady,
)
from works import WORKS

RESULT = {
    "peer": "fake", "steps": 2, "examples": 4, "tokens": 40, "supervised_tokens": 8, "train_seconds": 2.0,
    "tokens_per_second": 20.0, "peak_memory_bytes": 1000, "losses": [2.0, 1.0],
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Job:
    peers = tmp_path / "peers"
    peers.mkdir()
    return Job(
        model=tmp_path / "model",
        file=tmp_path / "rows.jsonl",
        batch_size=16,
        learning_rate=1e-3,
        max_length=1024,
        four_bit=False,
        threads=1,
        peers=peers,
    )


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_who_takes_part_and_with_how_many_rows() -> None:
    work = WORKS["short"]
    found = lineup(work, ["peft_trainer", "tutorial", "trl_sft", "trl_packing"], [None])
    assert [(c.name, c.rows) for c in found] == [
        ("trimtab", 9984),
        ("peft_trainer, micro-batch 4", 96),
        ("peft_trainer, micro-batch 8", 96),
        ("peft_trainer, micro-batch 16", 96),
        ("tutorial", 16),
        ("trl_sft, batch 16", 96),
        ("trl_sft --packing", 96),
    ]
    fewer = lineup(work, ["peft_trainer", "tutorial"], ["auto", "off"], batch_size=8, rows=64)
    assert [(c.name, c.rows, c.flags) for c in fewer] == [
        ("trimtab --compile auto", 64, ("--compile", "auto")),
        ("trimtab --compile off", 64, ("--compile", "off")),
        ("peft_trainer, micro-batch 4", 64, ("--micro_batch_size", "4")),
        ("peft_trainer, micro-batch 8", 64, ("--micro_batch_size", "8")),
        ("tutorial", 16, ()),
    ]
    only = lineup(work, ["peft_trainer"], [None], sizes=(2, 32))
    assert [c.name for c in only[1:]] == ["peft_trainer, micro-batch 2", "peft_trainer, micro-batch 16"]
    assert "tutorial" not in {c.name for c in lineup(WORKS["alpaca"], ["tutorial"], [None])}


def test_both_sides_are_told_the_same(job: Job) -> None:
    job = replace(job, four_bit=True, init_adapter=Path("start"))
    ours = our_command(job, 64, ("--compile", "off"), Path("out"))
    theirs = peer_command(job, "peft_trainer", 64, ("--micro_batch_size", "4"))
    assert job.peers is not None
    for name in ("model", "batch_size", "learning_rate", "max_length", "dtype", "init_adapter"):
        assert option(ours, name) == option(theirs, name)
    assert (option(ours, "max_train_samples"), option(theirs, "rows")) == ("64", "64")
    assert (option(ours, "shuffle"), option(ours, "warmup_ratio")) == ("false", "0")
    assert (option(ours, "load_in_4bit"), "--load_in_4bit" in theirs) == ("true", True)
    assert (option(ours, "compile"), option(theirs, "micro_batch_size")) == ("off", "4")
    packing = peer_command(job, "trl_packing", 64, ("--packing",))
    assert str(job.peers / "trl_sft.py") in packing
    assert "--init_adapter" not in packing


def test_our_options_exist() -> None:
    """A name that the command line does not know would end the first cell; here it ends in a second."""
    from dataclasses import fields

    from trimtab.train.options import TrainOptions

    job = Job(Path("m"), Path("r"), 16, 1e-3, 1024, True, 1, init_adapter=Path("a"))
    given = {word.removeprefix("--") for word in our_command(job, 16, (), Path("out")) if word.startswith("--")}
    assert given <= {f.name for f in fields(TrainOptions)}


def script(job: Job, name: str, text: str) -> None:
    assert job.peers is not None
    (job.peers / f"{name}.py").write_text(text)


def test_a_peer_is_run_beside_its_own_modules_and_its_result_is_read(job: Job, tmp_path: Path) -> None:
    assert job.peers is not None
    (job.peers / "common.py").write_text(f"RESULT = {json.dumps(RESULT)!r}")
    script(job, "tutorial", "from common import RESULT\nprint({'loss': 1})\nprint(RESULT)")
    found = measure(Contender("tutorial", "tutorial", 16), job, tmp_path / "logs")
    assert {name: found[name] for name in RESULT if name != "peak_memory_bytes"} == {
        name: value for name, value in RESULT.items() if name != "peak_memory_bytes"
    }
    assert (tmp_path / "logs" / "stdout.txt").read_text().startswith("{'loss': 1}")


def test_a_peer_that_fails_says_how(job: Job, tmp_path: Path) -> None:
    script(job, "tutorial", "raise ValueError('no such column')")
    with pytest.raises(RunFailed, match="exit code 1: ValueError: no such column"):
        measure(Contender("tutorial", "tutorial", 16), job, tmp_path / "logs")
    script(job, "tutorial", "print('done')")
    with pytest.raises(RunFailed, match="printed no result"):
        measure(Contender("tutorial", "tutorial", 16), job, tmp_path / "logs")


def test_the_adapter_is_made_once(job: Job, tmp_path: Path) -> None:
    text = (
        "import sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--adapter_out') + 1])\n"
        "folder.mkdir()\n"
        "(folder / 'adapter_config.json').write_text(sys.argv[sys.argv.index('--rows') + 1])\n"
        "raise SystemExit"
    )
    script(job, "peft_trainer", text)
    folder = make_adapter(job, tmp_path)
    assert (folder / "adapter_config.json").read_text() == "0"
    script(job, "peft_trainer", "raise ValueError")
    assert make_adapter(job, tmp_path) == folder


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (-9, "", "out of memory"),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "out of memory"),
        (1, "torch.OutOfMemoryError: CUDA out of memory", "out of memory"),
        (2, "Traceback\n  x\nTypeError: bad\n", "exit code 2: TypeError: bad"),
        (-15, "", "exit code -15: no message"),
    ],
)
def test_how_a_process_failed(code: int, text: str, said: str) -> None:
    assert reason(code, text) == said


def test_steady_speed_is_tokens_over_seconds_after_the_first_steps() -> None:
    assert steady([1.0, 1.0, 100.0, 300.0], warm=2) == 150.0  # as many tokens at 100 as at 300: 2 / (1/100 + 1/300)
    assert steady([1.0, 1.0, 100.0], warm=2) is None


def test_our_figures_come_from_the_run_folder(tmp_path: Path) -> None:
    names = ("steps", "tokens_computed", "supervised_tokens", "train_seconds", "tokens_per_second", "peak_memory_bytes")
    record: dict[str, Any] = {name: i for i, name in enumerate(names)} | {"examples_seen": 16, "tokens_seen": 99}
    (tmp_path / "run.json").write_text(json.dumps(record))
    steps = [{"step": i, "loss": 3.0 - i / 10, "tokens_per_second": 50.0 if i < 10 else 200.0} for i in range(20)]
    lines = [*steps[:5], {"step": 5, "eval_loss": 9.0}, *steps[5:]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = our_figures(tmp_path)
    assert (found["tokens"], found["examples"], found["tokens_computed"]) == (99, 16, 1)
    assert found["steady_tokens_per_second"] == 200.0
    assert (len(found["losses"]), found["losses"][0]) == (20, 3.0)

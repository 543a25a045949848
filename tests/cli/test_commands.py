"""The commands from outside: what they print, and that chat works from a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.cli.demo import HELD_OUT, ROWS, make_way, sparkline
from trimtab.core.config import load, methods
from trimtab.errors import ConfigError


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--help"], ["demo", "train", "chat", "merge", "methods", "sites", "data"]),
        (["train", "--help"], ["Data", "Model", "Optimisation", "Run", "--learning_rate", "[0.03]", "--config"]),
        (["train"], ["Usage: trimtab train DATA..."]),
        (["data", "check", "--help"], ["--show", "--train_on", "assistant|last|all"]),
        (["sites", "--help"], ["--target_modules"]),
        (["chat", "--help"], ["--max_new_tokens", "--temperature", "--system", "/base"]),
        (["merge", "--help"], ["--output_dir"]),
        (["--version"], ["trimtab 0."]),
    ],
)
def test_help(run: Callable, args: list[str], words: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 0
    assert [w for w in words if w not in result.output] == [], result.output


def test_commands_stand_in_the_order_of_a_first_day(run: Callable) -> None:
    from trimtab.cli import _DAY, app

    shown = run("--help").output
    assert sorted(_DAY, key=lambda name: shown.index(f"│ {name} ")) == list(_DAY)
    assert len(_DAY) == len(app.registered_commands) + len(app.registered_groups)


def test_help_of_train_names_every_option(run: Callable) -> None:
    from dataclasses import fields

    from trimtab.train.options import TrainOptions

    shown = run("train", "--help").output
    named = {f.name for f in fields(TrainOptions)} - {"adapter_options"}
    assert sorted(n for n in named if f"--{n} " not in shown) == []


def test_methods_is_a_table_of_equations(run: Callable) -> None:
    shown = run("methods").output
    assert [m for m in methods() if m not in shown] == []
    assert "W' = W + s B A" in shown and "2106.09685" in shown
    told = {line.split()[0]: line for line in shown.splitlines() if line.split()[:1] and line.split()[0] in methods()}
    assert "linear, embedding, conv, norm" in " ".join(told["ia3"].split()) and " yes " in told["ia3"]
    assert " linear  " in told["vera"] and "the whole model" in told["prompt_tuning"] and " no " in told["prompt_tuning"]


def test_methods_of_one_shows_its_options(run: Callable) -> None:
    shown = run("methods", "lora").output
    assert all(
        word in shown
        for word in (
            "--r ",
            "--lora_alpha",
            "--target_modules",
            "[8]",
            "[16]",
            "[all-linear]",
            "arxiv.org/abs/2106.09685",
        )
    )
    assert not [w for w in ("--megatron_config", "--megatron_core") if w in shown]  # not in this version
    assert shown.index("--r ") < shown.index("--lora_alpha") < shown.index("--bias")
    result = run("methods", "lorra")
    assert (result.exit_code, "Did you mean 'lora'?" in result.stderr) == (2, True)


def test_sites_counts_what_train_trains(run: Callable, model: Path, adapter: Path) -> None:
    shown = run("sites", model, "--r", "2").output
    trained = json.loads((adapter / "run.json").read_text())["trainable_parameters"]
    assert f"lora: {trained:,} trained of" in shown
    assert "q_proj" in shown and "32 x 32" in shown and "untouched: embed_tokens (1), lm_head (1)" in shown


def test_options_of_a_variant_are_given_as_a_mapping(run: Callable, model: Path) -> None:
    named, switched = (
        run("sites", model, "--adapter", *how, "--kasa_config", "{beta: 0.5}").output for how in (["kasa"], ["lora"])
    )
    assert named.partition("kasa: ")[2] == switched.partition("lora: ")[2] and "down_proj" in named
    result = run("sites", model, "--adapter", "kasa", "--kasa_config", "{bta: 0.5}")
    assert (result.exit_code, "Did you mean 'beta'?" in " ".join(result.stderr.split())) == (2, True)
    shown = " ".join(run("methods", "kasa").output.split())
    assert "--adapter lora --kasa_config {...}" in shown and "a mapping of beta (" in shown and "[0.001]" in shown


def test_how_a_variant_is_switched_on(run: Callable) -> None:
    shown = " ".join(run("methods").output.split())
    for how in ("--use_dora", "--alora_invocation_tokens A,B,...", "--monteclora_config {...}"):
        assert f"--adapter lora {how}" in shown
    shown = run("methods", "alora").output
    assert "--adapter alora --alora_invocation_tokens A,B,... [OPTIONS]" in shown and "--use_dora" not in shown
    assert "no paper" not in run("methods").output


@pytest.mark.parametrize("width", ["80", "120"])
def test_nothing_is_cut_at_this_width(run: Callable, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    from rich.console import Console

    from trimtab.cli import screen

    monkeypatch.setattr(screen, "console", lambda **_: Console(width=int(width), highlight=False))
    for args in (["train", "--help"], ["merge", "--help"], ["--help"], ["methods"], ["methods", "lora"]):
        shown = run(*args).output
        assert "…" not in shown and max(map(len, shown.splitlines())) <= int(width)


def test_all_helps_look_alike(run: Callable) -> None:
    for command in ("chat", "merge", "doctor"):
        shown = run(command, "--help").output
        assert f"Usage: trimtab {command} ADAPTER " in shown and "<" not in shown and "--help" not in shown


def test_dora_by_name_and_by_switch_are_one(run: Callable, model: Path) -> None:
    named, switched = (run("sites", model, "--adapter", *how).output for how in (["dora"], ["lora", "--use_dora"]))
    assert named.partition("dora: ")[2] == switched.partition("lora: ")[2] and "down_proj" in named


@pytest.mark.parametrize("method", methods())
def test_sites_knows_every_method(run: Callable, model: Path, method: str) -> None:
    small = load(method).small.items()  # some defaults are for large layers alone
    small = [part for k, v in small for part in (f"--{k}", v if isinstance(v, str) else json.dumps(v))]
    result = run("sites", model, "--adapter", method, *small)
    if method in ("adamss", "frod"):  # their start is a decomposition of the weights
        assert result.exit_code == 2 and "depends on the weights themselves" in result.output
        return
    if getattr(load(method).adapter, "among", False):  # experts that stand on no bare model
        assert result.exit_code == 2 and "adapter" in result.output and "Traceback" not in result.output
        return
    assert result.exit_code == 0, result.output
    assert re.search(rf"{method}: [1-9][\d,]* trained of", result.output)


def test_sites_of_a_prompt_that_starts_from_words(run: Callable, model: Path) -> None:
    result = run("sites", model, "--adapter", "prompt_tuning", "--prompt_tuning_init", "SAMPLE_VOCAB")
    assert result.exit_code == 0 and "prompt_tuning: 640 trained of" in result.output  # 20 tokens of width 32


def test_sites_of_a_pattern(run: Callable, model: Path) -> None:
    shown = run("sites", model, "--target_modules", r".*\.1\..*q_proj", "--r", "2").output
    assert "lora: 128 trained of" in shown  # 2 x (32 + 32), in one layer


def test_sites_reads_no_weights(run: Callable, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert run("sites", tmp_path).exit_code == 0


def test_data_check_decides_rows_as_train_does(run: Callable, model: Path, rows: Path, tmp_path: Path) -> None:
    chosen = ["--val_size", "10", "--max_train_samples", "20", "--seed", "3", "--max_length", "100"]
    shown = run("data", "check", rows, "--model", model, *chosen, "--show", "0").output
    out = tmp_path / "out"
    trained = run("train", rows, "--model", model, "--output_dir", out, "--max_steps", "1", "--dtype", "float32", *chosen)
    assert trained.exit_code == 0, trained.output
    for line in ("train: 20 rows read, ", "validation: 10 rows read, ", "not used: 10 rows behind max_train_samples"):
        assert line in shown and line in trained.output
    assert "validation rows that are training rows" in shown and "--- " not in shown
    result = run("data", "check", rows, "--model", model, "--show", "-1")
    assert result.exit_code == 2 and "show is -1; it must be at least 0" in result.stderr


def test_train_ends_with_what_to_do_next(run: Callable, model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["--max_steps", "1", "--batch_size", "2", "--dtype", "float32", "--lora_r", "2", "--output-dir", out]
    result = run("train", rows, "--base_model", model, *args)
    assert result.exit_code == 0, result.output
    for line in ("understood: lora_r -> r 2", f"trimtab chat {out}", f"trimtab merge {out}", f"--init_adapter {out}"):
        assert line in result.output
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "loss.png"} <= {
        f.name for f in out.iterdir()
    }


def test_merge_then_chat_with_the_plain_model(run: Callable, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    result = run("merge", adapter, "--output-dir", merged)
    assert result.exit_code == 0, result.output
    assert "verified" in result.output and f"trimtab chat {merged}" in result.output
    asked = ["--max-new-tokens", "4"]
    tuned, plain = (run("chat", folder, *asked, stdin="row 1\n") for folder in (adapter, merged))
    assert (plain.exit_code, plain.stdout) == (0, tuned.stdout)
    refused = run("chat", merged, stdin="hello\n/base\n")
    assert refused.exit_code == 2 and "no adapter" in refused.stderr


def test_chat_from_a_pipe(adapter: Path) -> None:
    lines = "row 1\n\n/base\n/help\n/reset\n/exit\nnever asked\n"
    command = [
        sys.executable,
        "-c",
        "from trimtab.cli import main; main()",
        "chat",
        str(adapter),
        "--max_new_tokens",
        "4",
    ]
    done = subprocess.run(
        command, input=lines.encode(), capture_output=True, timeout=200, env=os.environ | {"TERM": "xterm"}
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"forget the conversation" in done.stdout and b"pip install" not in done.stderr


def test_a_mistake_in_a_pipe_ends_the_chat(run: Callable, adapter: Path) -> None:
    result = run("chat", adapter, "--max_new_tokens", "4", stdin="/rest\nrow 1\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: no command /rest. Did you mean '/reset'? All of them: /help\n"


def test_a_base_that_moved_is_said_with_the_fix(run: Callable, adapter: Path, tmp_path: Path) -> None:
    import shutil

    moved = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/model"}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    result = run("chat", moved, stdin="hello\n")
    assert result.exit_code == 2 and "/gone/model" in result.stderr and "--model FOLDER" in result.stderr


def test_the_demo_has_its_rows() -> None:
    rows, held_out = (f.read_text(encoding="utf-8").splitlines() for f in (ROWS, HELD_OUT))
    assert len(rows) >= 240 and len(held_out) == 24
    assert {json.loads(r)["input"] for r in rows}.isdisjoint(json.loads(r)["input"] for r in held_out)


def test_the_demo_tells_the_whole_story(
    run: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model in place of the bundled one; a second run would replace the first, and nothing else."""
    import trimtab.demo.model

    monkeypatch.setattr(trimtab.demo.model, "bundled_model", lambda: model)
    result = run("demo", "--output_dir", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    told = ["1. The model", "272 to learn from and 24 held out", "answers before and after", "held out", "verified"]
    assert [
        w for w in [*told, "loss.png", f"trimtab chat {tmp_path / 'demo' / 'adapter'}"] if w not in result.output
    ] == []
    make_way(tmp_path / "demo" / "merged")
    assert not (tmp_path / "demo" / "merged").exists()
    with pytest.raises(ConfigError, match="is not an earlier demo's"):
        make_way(tmp_path / "demo" / "adapter")


def test_sparkline() -> None:
    assert sparkline([3, 2, 1], "abc") == "cba"
    assert sparkline([1, 1], "abc") == "aa"
    assert sparkline([4, 2, 2, 0], "abc", width=2) == "ca"


def test_the_package_can_be_run_as_a_module() -> None:
    said = subprocess.run([sys.executable, "-m", "trimtab", "--version"], capture_output=True, text=True, check=False)
    assert said.returncode == 0 and said.stdout.startswith("trimtab "), said.stderr

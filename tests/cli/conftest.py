"""A tiny model folder, rows, one trained adapter, and the command run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # the tiny model is made there

import model_folder as made

from trimtab.cli import app

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_rows(tmp_path_factory.mktemp("rows") / "colours.jsonl")


@pytest.fixture(scope="session")
def run() -> Run:
    def call(*args: str | Path, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in args], input=stdin, prog_name="trimtab")

    return call


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path, run: Run) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    steps = ["--max_steps", "2", "--batch_size", "4", "--r", "2", "--dtype", "float32"]
    result = run("train", rows, "--model", model, "--output_dir", folder, *steps)
    assert result.exit_code == 0, result.output + str(result.exception)
    return folder

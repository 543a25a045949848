"""A model folder and rows, as users have them."""

from __future__ import annotations

from pathlib import Path

import model_folder as made
import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_rows(tmp_path_factory.mktemp("rows") / "colours.jsonl")

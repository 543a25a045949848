"""A model folder and rows, as users have them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import model_folder as made
import pytest
import torch


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_rows(tmp_path_factory.mktemp("rows") / "colours.jsonl")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Layers of 32 units: a second thread only waits, for long on a machine that others use too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect garbage after each run: what is imported need not be looked through again
    yield
    torch.set_num_threads(before)

"""The models here have 32 units a layer: a second thread only waits."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect garbage after each run: what is imported need not be looked through again
    yield
    torch.set_num_threads(before)

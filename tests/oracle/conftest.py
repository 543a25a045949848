"""The oracle is peft 0.21.2; without it there is nothing to compare with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most methods mix the groups of a convolution, and say so when they are put on; here many are compared."""
    for item in items:
        if "oracle" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:adapter '.*' mixes the groups"))

"""Counts what the suite covered, from the reports alone, so that it is right under xdist too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most methods mix the groups of a convolution, and say so when they are put on; here all are put on."""
    for item in items:
        if "contract" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:adapter '.*' mixes the groups"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for r in terminalreporter.stats.get("passed", []) if r.when == "call"]
    cases = {value for r in reports for name, value in r.user_properties if name == "contract"}
    if cases:
        terminalreporter.write_line(f"contract: {len(cases)} (method, layer, base) cases")

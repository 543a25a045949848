"""Counts what the suite covered, from the reports alone, so that it is right under xdist too."""

from __future__ import annotations

from typing import Any

import torch

torch.set_num_threads(1)  # the tensors are tiny


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for r in terminalreporter.stats.get("passed", []) if r.when == "call"]
    cases = {value for r in reports for name, value in r.user_properties if name == "contract"}
    if cases:
        terminalreporter.write_line(f"contract: {len(cases)} (method, layer, base) cases")

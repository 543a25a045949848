"""No. 70: bfloat16 is taken where the chip computes it, never where torch emulates it; the choice comes with its reason."""

from __future__ import annotations

import pytest
import torch

from trimtab.train.device import pick


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("Tesla T4", (7, 5), torch.float32),
        ("Tesla V100", (7, 0), torch.float32),
        ("A100", (8, 0), torch.bfloat16),
        ("H100", (9, 0), torch.bfloat16),
    ],
)
def test_by_the_capability_of_the_card(
    name: str, capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # what it says of emulation
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    found = pick()
    assert (found.device.type, found.dtype) == ("cuda", dtype)
    assert f"{name} (capability {capability[0]}.{capability[1]})" in found.why
    asked = pick("bfloat16")
    assert asked.dtype is torch.bfloat16 and ("has no native bfloat16" in asked.why) == (dtype is torch.float32)

"""No. 75: on a Mac the dtype is one that its system computes, and the reason is said."""

from __future__ import annotations

import platform

import pytest
import torch

from trimtab.train.device import pick


@pytest.mark.parametrize(("release", "dtype"), [("13.6", torch.float32), ("14.1", torch.bfloat16), ("", torch.float32)])
def test_by_the_release_of_the_system(release: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), "arm64"))
    found = pick()
    assert (found.device.type, found.dtype) == ("mps", dtype) and f"macOS {release}" in found.why

"""No. 56: trimtab needs no native library; where 4 bit wants one that is absent, that is said with the command to get it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folder import write_model

from trimtab.errors import ConfigError
from trimtab.train.load import load_model


def test_a_base_in_4_bit_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, find = write_model(tmp_path / "model"), importlib.util.find_spec

    def absent(name: str, *more: Any) -> Any:
        return None if name == "bitsandbytes" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed: pip install bitsandbytes"):
        load_model(folder, dtype=torch.float32, load_in_4bit=True)
    assert load_model(folder, dtype=torch.float32).device.type == "cpu"  # without 4 bit nothing asks for it

"""No. 77: an adapter folder names its base and holds a fingerprint of it; another base is refused by both names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from little import finished
from safetensors.torch import load_file, save_file

from trimtab import PeftConfig, PeftModel
from trimtab.errors import BadCheckpoint
from trimtab.train.load import load_model


def test_it_is_recorded_and_compared(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    out = finished(tmp_path_factory)
    base = out.with_name("model")
    assert Path(str(PeftConfig.from_pretrained(out).base_model_name_or_path)) == base
    record = json.loads((out / "trimtab.json").read_text())["base"]
    assert record["tensors"] == len(load_file(base / "model.safetensors")) and len(record["weights"]) == 32
    assert record["config"]["hidden_size"] == 32
    PeftModel.from_pretrained(load_model(base, dtype=torch.float32), out)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    weights = {k: v + 0.01 for k, v in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=rf"made for .*{base.name}, and this is .*other: of one architecture"):
        PeftModel.from_pretrained(load_model(other, dtype=torch.float32), out)

"""No. 42: pickles are not opened, not even with consent as programs; and a run writes none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from little import finished
from model_folder import write_model
from small_llama import llama

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.train.load import model_folder


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_malicious_adapter_raises_and_does_not_run(tmp_path: Path) -> None:
    folder, sprung = tmp_path / "adapter", tmp_path / "sprung"
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap(sprung)}, folder / "adapter_model.bin")
    with pytest.raises(BadCheckpoint, match=r"is a pickle.*convert it once"):
        PeftModel.from_pretrained(llama(), folder)
    with pytest.raises(BadCheckpoint, match=r"cannot be read"):
        PeftModel.from_pretrained(llama(), folder, allow_pickle=True)
    assert not sprung.exists()


def test_a_base_of_pickles_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pickled weights.*Convert them once to safetensors"):
        model_folder(str(folder))


def test_a_run_writes_no_pickle(tmp_path_factory: pytest.TempPathFactory) -> None:
    written = [f for f in finished(tmp_path_factory).rglob("*") if f.is_file()]
    assert any("checkpoint-1" in str(f) for f in written)
    assert {f.suffix for f in written} <= {".safetensors", ".json", ".jsonl", ".jinja", ".png", ".md", ".txt", ".yaml"}
    heads = {f: f.read_bytes()[:2] for f in written}
    assert not [f for f, head in heads.items() if head in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")]

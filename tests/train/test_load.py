"""Which model is read, in which dtype, and what is said when it cannot be."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.train import device, load


def test_a_missing_folder_names_its_neighbours(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'tiny-llama'\?"):
        load.model_folder(str(model_folder.parent / "tiny-lama"))
    with pytest.raises(ConfigError, match=r"Folders in .*: tiny-llama"):
        load.model_folder(str(model_folder.parent / "quite-other"))


def test_a_hub_name_is_looked_up_in_the_cache_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"in the local cache .* No network is used"):
        load.model_folder("nobody/nothing-at-all")


def test_folders_that_are_no_model(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json. Models inside it: tiny-llama"):
        load.model_folder(str(model_folder.parent))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is an adapter folder, not a model\. .* --init_adapter"):
        load.model_folder(str(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        load.model_folder(str(tmp_path / "adapter_config.json"))


def test_pickled_weights_are_not_read(model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(model_folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"no \*\.safetensors beside it"):
        load.model_folder(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load.model_folder(str(tmp_path))


def test_a_model_folder_that_holds_an_adapter_is_no_base(model_folder: Path, tmp_path: Path) -> None:
    """transformers would put it on the model unasked, where `peft` is installed."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "adapter_config.json").write_text("{}")
    for use in (lambda: load.model_folder(str(folder)), lambda: load.load_model(folder, dtype=torch.float32)):
        with pytest.raises(ConfigError, match="holds a model and an adapter"):
            use()


def test_a_config_that_is_no_object(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "config.json").write_text("[1]")
    for use in (lambda: load.load_tokenizer(folder), lambda: load.skeleton(str(folder))):
        with pytest.raises(ConfigError, match="config"):
            use()


def test_damaged_weights_are_an_error(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadCheckpoint, match="damaged or cut off"):
        load.load_model(folder, dtype=torch.float32)


def test_weights_that_lack_a_tensor_are_an_error(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 tensors of the model \(model.layers.1.mlp.up_proj.weight\)"):
        load.load_model(folder, dtype=torch.float32)


def test_the_model_is_frozen_and_in_the_dtype(model_folder: Path) -> None:
    model = load.load_model(model_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_tokenizer_without_pad_pads_with_eos(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load.load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_no_tokenizer_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(model_folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer could be read from"):
        load.load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_4_bit_layers_compute_in_the_dtype_of_the_run(dtype: torch.dtype) -> None:
    config = load.nf4(dtype)
    assert config.bnb_4bit_compute_dtype is dtype
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant


def test_4_bit_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install bitsandbytes"):
        load.nf4(torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype", "said"),
    [((8, 0), torch.bfloat16, "natively"), ((7, 5), torch.float32, "Turing (capability 7.5) has no native bfloat16")],
)
def test_cuda_by_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing")
    found = device.pick()
    assert (found.device, found.dtype) == (torch.device("cuda"), dtype) and said in found.why
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")  # of several processes each has a card of its own
    assert device.pick().device == torch.device("cuda", 1) and taken == [torch.device("cuda", 1)]


@pytest.mark.parametrize(("flag", "dtype"), [("amx_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_cpu_by_what_it_multiplies(monkeypatch: pytest.MonkeyPatch, flag: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert device.pick().dtype is dtype
    assert "bfloat16" in device.pick("bfloat16").why
    with pytest.raises(ConfigError, match="a CPU does not train in it"):
        device.pick("float16")


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: Any = (99.0, 0.0, 0.0)
    monkeypatch.setattr("os.getloadavg", lambda: loads)
    assert "load 99.0" in (device.busy() or "")
    loads = (0.0, 0.0, 0.0)
    assert device.busy() is None

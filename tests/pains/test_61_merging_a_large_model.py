"""No. 61: beside the base, which stays in its files, a merge holds a shard of what it writes and not the model."""

from __future__ import annotations

import json
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "train"))

from model_folder import tokenizer

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.export import stream
from trimtab.train import load

MB = 2**20
SHARD = 6 * MB


class Held(TorchDispatchMode):
    """Bytes of the tensors that are made and not yet let go; `peak`: the most there were at once, with Python's own."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves(made) if isinstance(t, Tensor) and t.device.type == "cpu"):
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in before and key not in self.alive:  # neither a view nor a change in place
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key)
        self.look()
        return made

    def look(self) -> None:
        self.peak = max(self.peak, sum(self.alive.values()) + tracemalloc.get_traced_memory()[0])


def written(folder: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Merge in bfloat16; the peak of what is held meanwhile in MB."""
    model = PeftModel.from_pretrained(load.load_model(folder, dtype=torch.bfloat16), adapter)
    save, held = stream.save_file, Held()

    def saved(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        held.look()

    monkeypatch.setattr(stream, "save_file", saved)
    tracemalloc.start()
    try:
        with held:
            stream.write(model, folder, torch.bfloat16, out)
        return max(held.peak, tracemalloc.get_traced_memory()[1]) / MB
    finally:
        tracemalloc.stop()


def test_a_merge_holds_a_shard_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer()
    config = LlamaConfig(vocab_size=len(tok), hidden_size=512, intermediate_size=1024, num_hidden_layers=12,
                         num_attention_heads=4, tie_word_embeddings=False)  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.bfloat16().to_empty(device="cpu")
    draw = torch.linspace(-0.05, 0.05, 512 * 1024).bfloat16()
    for p in model.parameters():
        p.data.copy_(draw[: p.numel()].view_as(p))
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(folder, max_shard_size="8MB")
    tok.save_pretrained(folder)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / MB
    assert len([*folder.glob("*.safetensors")]) > 5 and size > 60
    made = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    made.save_pretrained(adapter)
    name = "model.layers.11.mlp.down_proj"
    with torch.no_grad():
        want = made.get_base_model().get_submodule(name).stack(("default",)).weight().bfloat16()
    del made, model

    monkeypatch.setattr(stream, "SHARD", SHARD)
    by_shard = written(folder, adapter, tmp_path / "out", monkeypatch)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) >= 11
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    with safe_open(tmp_path / "out" / index["weight_map"][f"{name}.weight"], "pt") as file:
        assert torch.equal(file.get_tensor(f"{name}.weight"), want)
    monkeypatch.setattr(stream, "_named_alike", lambda *_: False)
    whole = written(folder, adapter, tmp_path / "whole", monkeypatch)
    assert by_shard < 3 * SHARD / MB < size / 3, f"{by_shard:.1f} MB held"
    assert whole > 1.5 * size, f"{whole:.1f} MB held: the count would see a whole model"

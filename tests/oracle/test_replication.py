"""`layer_replication`: a deeper model whose copies share their weights, in peft's hands and ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import base, close, configs, exchange, inputs, logits, move, quiet_peft
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import trimtab
from trimtab.errors import BadCheckpoint, ConfigError, NoMatch, NotSupported

SPANS = [[0, 2], [0, 1], [1, 2]]


def qwen(_: str = "") -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_attention_heads=2, head_dim=8)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 4}
    made = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=1, num_hidden_layers=2, **kinds)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    return made


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_exchange_of_replicated_layers(model: str, tmp_path: Path) -> None:
    loaded = exchange(model, *configs("lora", model, layer_replication=SPANS, r=4), tmp_path)
    inner = loaded.get_base_model()
    assert inner.config.num_hidden_layers == 4
    own = [p for p in inner.parameters() if p.dim() > 1]
    assert len({id(p) for p in own}) == len(own)  # torch names a shared one once: copies share all that is frozen
    plain = {n.rpartition(".")[2] for n, p in loaded.named_parameters() if "lora" not in n and "layers.3" in n}
    assert not plain


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen"])
def test_generate_with_a_cache_is_greedy_decoding(model: str) -> None:
    made = qwen() if model == "qwen" else base(model)
    us = trimtab.get_peft_model(made, configs("lora", "llama", layer_replication=SPANS, target_modules="all-linear")[0]).eval()
    move(us)
    ids = inputs("llama")["input_ids"][:1]
    got = us.generate(input_ids=ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = ids
    with torch.no_grad():
        for _ in range(9):
            want = torch.cat([want, us(input_ids=want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)
    indices = [m.layer_idx for m in us.get_base_model().modules() if hasattr(m, "layer_idx")]
    assert sorted(set(indices)) == [0, 1, 2, 3]


def test_types_of_layers_are_replicated_with_them() -> None:
    us = trimtab.get_peft_model(qwen(), configs("lora", "llama", layer_replication=SPANS)[0])
    kinds = us.get_base_model().config.layer_types
    assert kinds == ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def test_merged_replicas_are_apart_and_a_saved_model_is_deep(tmp_path: Path) -> None:
    us = trimtab.get_peft_model(base("llama"), configs("lora", "llama", layer_replication=SPANS)[0])
    move(us)
    want = logits(us, "llama")
    merged = us.merge_and_unload()
    close(logits(merged, "llama"), want)
    first, third = (merged.model.layers[i].self_attn.q_proj.weight for i in (0, 2))
    assert (first - third).abs().max() > 1e-3
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert len(again.model.layers) == 4
    close(logits(again, "llama"), want)


def test_a_model_is_as_deep_as_before_when_its_adapters_are_gone(tmp_path: Path) -> None:
    made = base("llama")
    layers, want = made.model.layers, logits(made, "llama")
    config = configs("lora", "llama", layer_replication=SPANS)[0]
    us = trimtab.get_peft_model(made, config)
    us.add_adapter("b", copy.deepcopy(config))
    us.add_adapter("c", configs("lora", "llama")[0])
    assert len(made.model.layers) == 4 and us.get_base_model().trimtab_groups["c"].layers.keys() >= {
        "model.layers.3.self_attn.q_proj"
    }
    with pytest.raises(ConfigError, match="replicated as"):
        us.add_adapter("d", configs("lora", "llama", layer_replication=[[0, 1]])[0])
    us.set_adapter("c")
    for name in ("default", "b"):
        us.delete_adapter(name)
        assert len(made.model.layers) == 4
    us.delete_adapter("c")
    assert made.model.layers is layers and made.config.num_hidden_layers == 2
    assert torch.equal(logits(made, "llama"), want)
    trimtab.get_peft_model(made, config).unload()
    assert made.model.layers is layers
    with pytest.raises(NoMatch):
        trimtab.get_peft_model(made, configs("lora", "llama", layer_replication=SPANS, target_modules=["no"])[0])
    assert made.model.layers is layers
    us = trimtab.get_peft_model(made, config)
    us.save_pretrained(tmp_path)
    us.unload()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BadCheckpoint):
        trimtab.PeftModel.from_pretrained(made, tmp_path)
    assert made.model.layers is layers and torch.equal(logits(made, "llama"), want)


def test_a_second_adapter_finds_the_layers_replicated_where_peft_replicates_them_again() -> None:
    ours, theirs = configs("lora", "llama", layer_replication=SPANS)
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    us.add_adapter("b", copy.deepcopy(ours))
    assert len(us.get_base_model().model.layers) == 4
    them.add_adapter("b", peft.LoraConfig(layer_replication=[[0, 4], [0, 4]], task_type="CAUSAL_LM"))
    assert len(them.get_base_model().model.layers) == 8


def test_what_cannot_be_replicated_is_refused() -> None:
    for spans in ([[0, 3]], [[1, 1]], [[-1, 1]]):
        made = base("llama")
        with pytest.raises(ConfigError, match="0 <= from < to <= 2"):
            trimtab.get_peft_model(made, configs("lora", "llama", layer_replication=spans)[0])
        assert len(made.model.layers) == 2
    with pytest.raises(NotSupported, match=r"encoder\.block.*decoder\.block"):
        trimtab.get_peft_model(base("t5"), configs("lora", "t5", layer_replication=SPANS)[0])
    us = trimtab.get_peft_model(base("llama"), configs("lora", "llama")[0])
    with pytest.raises(ConfigError, match="put this adapter on first"):
        us.add_adapter("b", configs("lora", "llama", layer_replication=SPANS)[0])

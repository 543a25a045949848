"""Adaption prompts against peft: folders both ways, gradients, and where its attention takes the wrong heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from theirs import base, close, configs, exchange, inputs, keys, logits, move, quiet_peft
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import trimtab
from trimtab.errors import ConfigError, NotSupported

SIZES: dict[str, Any] = dict(
    vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def mistral(name: str) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)).eval()


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [1, 2])
def test_exchange_adaption_prompt(layers: int, model: str, tmp_path: Path) -> None:
    exchange(model, *configs("adaption_prompt", model, adapter_len=5, adapter_layers=layers), tmp_path)
    where = {"llama": "model.layers.1.self_attn", "gpt2": "transformer.h.1.attn"}[model]
    found = keys(tmp_path / "ours")
    assert found[f"base_model.model.{where}.adaption_prompt"] == (1, 5, 32) and len(found) == 2 * layers


def test_exchange_adaption_prompt_on_mistral(tmp_path: Path) -> None:
    exchange("llama", *configs("adaption_prompt", "llama", adapter_len=5, adapter_layers=2), tmp_path, make=mistral)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_gradients_of_an_adaption_prompt_are_peft_s(model: str) -> None:
    ours, theirs = configs("adaption_prompt", model, adapter_len=5, adapter_layers=2)
    us, them = trimtab.get_peft_model(base(model), ours).eval(), quiet_peft(base(model), theirs)
    fresh = logits(us, model)
    close(fresh, logits(base(model), model), 1e-6)  # the gate is closed
    move(them)
    pairs = {n.replace("base_model.model.", ""): p for n, p in them.named_parameters() if "adaption_" in n}
    sites = us.get_base_model().trimtab_groups["default"].sites()
    own = {f"{path}.{n}": p for path, a in sites for n, p in a.named_parameters()}
    assert own.keys() == pairs.keys()
    for name, p in pairs.items():
        own[name].data.copy_(p.data)
    ids = inputs(model)["input_ids"]
    for m in (us, them):
        m(input_ids=ids, labels=ids).loss.backward()
    for name, p in pairs.items():
        assert p.grad is not None and p.grad.abs().max() > 0
        close(own[name].grad, p.grad, 1e-6)  # type: ignore[arg-type]


def test_heads_that_are_not_as_wide_as_the_model_where_peft_fails() -> None:
    torch.manual_seed(0)
    make = lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=4)).eval()  # noqa: E731
    ours, theirs = configs("adaption_prompt", "llama", adapter_len=5, adapter_layers=2)
    us, them = trimtab.get_peft_model(make(), ours).eval(), quiet_peft(make(), theirs)
    ids = inputs("llama")["input_ids"]
    move(us)
    assert us(input_ids=ids).logits.isfinite().all()
    with pytest.raises(RuntimeError):
        them(input_ids=ids)
    attention: Any = us.get_base_model().model.layers[1].self_attn
    adapter, x = attention.adapters["default"], torch.randn(1, 3, 32)
    zero = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)  # no turn
    y, _ = attention(x, position_embeddings=zero, attention_mask=None)
    plain, _ = attention.base_layer(x, position_embeddings=zero, attention_mask=None)
    q, P = attention.q_proj(x).view(3, 4, 4), adapter.adaption_prompt[0]
    k, v = (f(P).view(5, 2, 4)[:, [0, 0, 1, 1]] for f in (attention.k_proj, attention.v_proj))
    p = (torch.einsum("thd,lhd->htl", q, k) / 2).softmax(-1)
    want = plain + adapter.adaption_gate * attention.o_proj(torch.einsum("htl,lhd->thd", p, v).flatten(1))
    close(y, want, 1e-6)


def test_what_is_missing_or_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="adapter_len has no default"):
        trimtab.get_peft_model(base("llama"), configs("adaption_prompt", "llama", adapter_layers=1)[0])
    with pytest.raises(ConfigError, match="adapter_layers=3, and the model has 2"):
        trimtab.get_peft_model(base("llama"), configs("adaption_prompt", "llama", adapter_len=4, adapter_layers=3)[0])
    with pytest.raises(NotSupported, match="not on bert"):
        trimtab.get_peft_model(base("bert"), configs("adaption_prompt", "bert", adapter_len=4, adapter_layers=1)[0])

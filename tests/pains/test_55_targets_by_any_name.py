"""No. 55: without targets every decoder gets its own; a wrong name is answered with the right ones and their counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from trimtab import LoraConfig, get_peft_model
from trimtab.errors import NoMatch

SMALL: dict[str, dict[str, Any]] = {
    "Llama": dict(intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
    "Phi": dict(intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
    "OPT": dict(ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=32),
    "Bloom": dict(n_layer=2, n_head=2),
    "GPT2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=32),
}
HEAD = {"Bloom": "BloomForCausalLM", "GPT2": "GPT2LMHeadModel"}
WANT = {"Llama": "q_proj", "Phi": "q_proj", "OPT": "q_proj", "Bloom": "query_key_value", "GPT2": "c_attn"}


def model(name: str) -> Any:
    torch.manual_seed(0)
    shared = dict(vocab_size=37, hidden_size=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = getattr(transformers, f"{name}Config")(**shared | SMALL[name])
    return getattr(transformers, HEAD.get(name, f"{name}ForCausalLM"))(config)


@pytest.mark.parametrize("name", SMALL)
def test_each_family_has_its_targets(name: str) -> None:
    for targets in (None, "all-linear"):
        tuned = get_peft_model(model(name), LoraConfig(r=2, target_modules=targets))
        paths = {n.split(".lora_A")[0] for n, _ in tuned.named_parameters() if "lora_A" in n}
        assert sum(p.endswith(WANT[name]) for p in paths) == 2
        ids = torch.tensor([[3, 4, 5]])
        tuned(input_ids=ids, labels=ids).loss.backward()
        grads = {n: p.grad for n, p in tuned.named_parameters() if "lora_B" in n}
        assert all(g is not None and g.abs().sum() > 0 for g in grads.values())


@pytest.mark.parametrize(("name", "typed"), [("Bloom", "query_key_values"), ("GPT2", "c_atn"), ("OPT", "q_prj")])
def test_a_wrong_name_is_answered_with_the_right_one(name: str, typed: str) -> None:
    with pytest.raises(NoMatch, match=rf"'{typed}'.*Did you mean '{WANT[name]}'\?.*{WANT[name]} \(2\)"):
        get_peft_model(model(name), LoraConfig(target_modules=[typed]))

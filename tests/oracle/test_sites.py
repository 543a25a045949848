"""Where an adapter can stand beside the layers of a list: norms, rows of embeddings, tied heads; peft's folders and ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import base, close, configs, exchange, keys, llama, logits, move, quiet_peft
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab
from trimtab.errors import BadCheckpoint, ConfigError, NoMatch, TrimtabWarning

LN_MODELS = [("llama", None), ("gpt2", None), ("t5", None), ("bert", ["LayerNorm"]), ("llama", ["q_proj", "input_layernorm"])]


def tied(_: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    config = llama().config.to_dict() | {"tie_word_embeddings": True}
    made = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(2)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    return made


def untied(_: str) -> nn.Module:
    return base("llama")


@pytest.mark.parametrize(("model", "targets"), LN_MODELS)
def test_exchange_ln_tuning(model: str, targets: list[str] | None, tmp_path: Path) -> None:
    exchange(model, *configs("ln_tuning", model, target_modules=targets), tmp_path)


@pytest.mark.parametrize("make", [tied, untied])
@pytest.mark.parametrize("options", [{}, {"init_weights": False}, {"target_modules": ["embed_tokens"]}])
def test_exchange_trainable_tokens(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = configs("trainable_tokens", "llama", token_indices=[7, 3, 20], **options)
    exchange("llama", ours, theirs, tmp_path, make=make)
    assert len(keys(tmp_path / "ours")) == (2 if make is tied else 1)  # the head's are the embedding's


TOKENS: list[Any] = [
    [7, 3, 20],
    {"embed_tokens": [4, 30]},
    {"embed_tokens": [4, 30], "lm_head": [4, 30]},
    {"embed_tokens": [4, 30], "lm_head": [9]},
]


@pytest.mark.parametrize("make", [tied, untied])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_exchange_lora_with_trained_tokens(make: Any, tokens: Any, tmp_path: Path) -> None:
    ours, theirs = configs("lora", "llama", trainable_token_indices=tokens)
    loaded = exchange("llama", ours, theirs, tmp_path, make=make)
    merged = loaded.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight) is (make is tied and tokens != TOKENS[-1])


def test_tied_rows_move_together_and_merge_into_one_weight(tmp_path: Path) -> None:
    model = trimtab.get_peft_model(tied(), configs("trainable_tokens", "llama", token_indices=[7, 3])[0])
    move(model)
    want = logits(model, "llama")
    merged = model.merge_and_unload()
    close(logits(merged, "llama"), want, 1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path), "llama"), want, 1e-5)
    changed = (merged.lm_head.weight != tied().lm_head.weight).any(1).nonzero().flatten().tolist()
    assert changed == [3, 7]


TIES: list[tuple[dict[str, Any], bool]] = [
    ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    ({"target_modules": ["lm_head", "q_proj"]}, False),
    ({"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True, "lora_alpha": 3}, False),
    ({"modules_to_save": ["embed_tokens"]}, True),
    ({"modules_to_save": ["lm_head"]}, False),
]


@pytest.mark.parametrize(("options", "same"), TIES, ids=str)
def test_exchange_of_tied_adapters(options: dict[str, Any], same: bool, tmp_path: Path) -> None:
    """peft rewrites the names in the config; both spellings mean the same."""
    ours, theirs = configs("lora", "llama", r=4, ensure_weight_tying=True, **options)
    them = quiet_peft(tied(), theirs)
    move(them)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        them.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    read = trimtab.PeftModel.from_pretrained(tied(), tmp_path / "theirs")
    close(logits(read, "llama"), logits(them, "llama"))
    us = trimtab.get_peft_model(tied(), ours)
    move(us)
    us.save_pretrained(tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(tied(), str(tmp_path / "ours")).eval()
    close(logits(us, "llama"), logits(back, "llama"))
    again = trimtab.PeftModel.from_pretrained(tied(), tmp_path / "ours")
    assert torch.equal(logits(again, "llama"), logits(us, "llama"))
    merged = us.merge_and_unload()
    close(logits(merged, "llama"), logits(back, "llama"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_tied_adapters_stay_tied_on_bfloat16_where_peft_s_come_apart() -> None:
    ours, theirs = configs("lora", "llama", r=4, ensure_weight_tying=True, target_modules=["embed_tokens"])
    us, them = trimtab.get_peft_model(tied().bfloat16(), ours), quiet_peft(tied().bfloat16(), theirs)
    for model in (us, them):
        assert sum("lora" in n for n, _ in model.named_parameters()) == (2 if model is us else 4)
    move(us)
    state = trimtab.get_peft_model_state_dict(us)
    a, b = state["base_model.model.model.embed_tokens.lora_embedding_A"], state["base_model.model.lm_head.lora_B.weight"]
    assert a.dtype == torch.float32 and torch.equal(a, b.T) and a.data_ptr() == b.data_ptr() and a.abs().max() > 0


def test_a_file_whose_tied_tensors_differ_is_refused() -> None:
    us = trimtab.get_peft_model(tied(), configs("lora", "llama", ensure_weight_tying=True, target_modules=["lm_head"])[0])
    state = {k: v.clone() for k, v in trimtab.get_peft_model_state_dict(us).items()}
    trimtab.set_peft_model_state_dict(us, state)
    state["base_model.model.lm_head.lora_B.weight"] += 1
    with pytest.raises(BadCheckpoint, match=r"lora_.* is tied to .*lora_"):
        trimtab.set_peft_model_state_dict(us, state)


@pytest.mark.parametrize("method", ["dora"])
def test_methods_without_published_tied_keys_follow_by_their_equation(method: str, tmp_path: Path) -> None:
    ours = configs(method, "llama", r=4, ensure_weight_tying=True, target_modules=["embed_tokens", "v_proj"])[0]
    us = trimtab.get_peft_model(tied(), ours)
    move(us)
    us.save_pretrained(tmp_path)
    assert not any("lm_head" in k for k in keys(tmp_path))
    want = logits(us, "llama")
    assert torch.equal(logits(trimtab.PeftModel.from_pretrained(tied(), tmp_path), "llama"), want)
    merged = us.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    close(logits(merged, "llama"), want)


def test_what_cannot_be_tied_is_told() -> None:
    with pytest.warns(TrimtabWarning, match="no layer of this model is tied"):
        trimtab.get_peft_model(untied(""), configs("lora", "llama", ensure_weight_tying=True)[0])
    with pytest.warns(TrimtabWarning, match="no tied layer is among"):
        trimtab.get_peft_model(tied(), configs("lora", "llama", ensure_weight_tying=True)[0])
    other = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(ConfigError, match="share one weight"):
        trimtab.get_peft_model(tied(), configs("lora", "llama", ensure_weight_tying=True, trainable_token_indices=other)[0])
    with pytest.raises(ConfigError, match="modules_to_save"):
        saved: dict[str, Any] = dict(modules_to_save=["embed_tokens"], trainable_token_indices=[1])
        trimtab.get_peft_model(tied(), configs("lora", "llama", **saved)[0])
    with pytest.raises(NoMatch, match="embed_tokens"):
        trimtab.get_peft_model(tied(), configs("lora", "llama", trainable_token_indices={"embed_token": [1]})[0])
    with pytest.raises(ConfigError, match="has that many rows"):
        trimtab.get_peft_model(tied(), configs("lora", "llama", trainable_token_indices=[37])[0])


def test_tokens_and_an_adapter_may_share_an_embedding(tmp_path: Path) -> None:
    tokens: dict[str, Any] = dict(target_modules=["embed_tokens"], trainable_token_indices=[4, 9], ensure_weight_tying=True)
    us = trimtab.get_peft_model(tied(), configs("lora", "llama", r=4, **tokens)[0])
    move(us)
    want = logits(us, "llama")
    us.save_pretrained(tmp_path)
    assert len(keys(tmp_path)) == 5
    assert torch.equal(logits(trimtab.PeftModel.from_pretrained(tied(), tmp_path), "llama"), want)
    merged = us.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    close(logits(merged, "llama"), want)


def test_peft_cannot_train_tokens_of_an_embedding_that_lora_adapts() -> None:
    tokens: dict[str, Any] = dict(target_modules=["embed_tokens"], trainable_token_indices=[4, 9])
    with pytest.raises(TypeError, match="cannot be applied"):
        logits(quiet_peft(tied(), configs("lora", "llama", **tokens)[1]), "llama")
    assert logits(trimtab.get_peft_model(tied(), configs("lora", "llama", **tokens)[0]), "llama").isfinite().all()

"""aLoRA: where it begins to act in a row, with padding and without, in one forward and along a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_llama import endless
from torch import Tensor

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import ConfigError, NotMergeable, NotSupported, TrainingError
from trimtab.model import checkpoint_activations

INVOCATION = [7, 8]
ROWS = [[9, 7, 8, 4, 7, 8, 5], [0, 0, 3, 7, 8, 7, 4], [4, 5, 6, 9, 7, 3, 8], [0, 7, 8, 4, 6, 5, 9]]
STARTS = [4, 3, 7, 1]  # of the last invocation; the third row has none
IDS = torch.tensor(ROWS)
MASK = (IDS != 0).long()


def llama() -> Any:
    return endless(4)


def alora(**more: Any) -> PeftModel:
    fields: dict[str, Any] = dict(target_modules=["q_proj", "v_proj", "down_proj"], r=2, init_lora_weights=False)
    fields |= {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"} | more
    return get_peft_model(llama(), config_for("alora", **fields)).eval()


def test_the_layer_acts_from_the_last_invocation_on() -> None:
    model = alora(lora_bias=False)
    layer: Any = model.get_base_model().model.layers[0].self_attn.q_proj
    caught: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda m, args, y: caught.append((args[0], y)))
    model(IDS, attention_mask=MASK)
    (x, y), lora = caught[0], layer.adapters["default"].lora
    acts = torch.arange(7) >= torch.tensor(STARTS)[:, None]
    want = layer.base_layer(x) + acts[..., None] * (lora.s * x @ lora.lora_A.weight.T @ lora.lora_B.weight.T)
    assert (y - want).abs().max() < 1e-5 and lora.s == 4


def test_before_the_invocation_the_model_is_the_base() -> None:
    model = alora()
    y = model(IDS, attention_mask=MASK).logits
    with model.disable_adapter():
        base = model(IDS, attention_mask=MASK).logits
    for i, start in enumerate(STARTS):
        assert torch.equal(y[i, :start], base[i, :start])
        assert start == 7 or (y[i, start:] - base[i, start:]).abs().max() > 0.1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_generate_is_greedy_decoding_row_by_row(use_cache: bool, beams: int) -> None:
    model = alora()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "num_beams": beams}
    got = model.generate(input_ids=IDS, attention_mask=MASK, **options)
    with model.disable_adapter():
        base = model.generate(input_ids=IDS, attention_mask=MASK, **options)
    for i, row in enumerate(ROWS):
        ids = torch.tensor([[t for t in row if t]])
        one = model.generate(input_ids=ids, **options)[0, ids.shape[1] :]
        assert torch.equal(one, got[i, 7:])
        if beams == 1:
            out = ids
            for _ in range(6):
                with torch.no_grad():
                    out = torch.cat([out, model(out, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
            assert torch.equal(out[0, ids.shape[1] :], one)
        assert torch.equal(got[i], base[i]) == (STARTS[i] == 7)


def test_a_cache_of_the_base_model_is_gone_on_from() -> None:
    """What aLoRA is for: the conversation's cache is the base model's, the invocation comes after it."""
    model, row = alora(), IDS[:1, :]
    want = model(row).logits
    with model.disable_adapter():
        cache = model(row[:, :4], use_cache=True).past_key_values
    got = model(row[:, 4:6], past_key_values=cache, use_cache=True)
    last = model(row[:, 6:], past_key_values=got.past_key_values).logits
    fresh = model(torch.cat([torch.tensor([[9, 9, 9, 4]]), row[:, 4:]], 1)).logits
    assert (fresh[:, 4:] - want[:, 4:]).abs().max() > 1e-3  # what stands before matters
    with model.disable_adapter():
        base = model(row).logits
    prefix = alora()
    prefix.peft_config["default"].alora_invocation_tokens = [7, 8, 5]  # begins where the cache ends
    assert (torch.cat([got.logits, last], 1) - prefix(row).logits[:, 4:]).abs().max() < 1e-4
    assert (got.logits - base[:, 4:6]).abs().max() > 1e-2


@torch.no_grad()
def test_a_copied_cache_knows_what_was_invoked() -> None:
    model, row = alora(), IDS[:1]
    want = model(row).logits[:, -1]
    cache = model(row[:, :-1], use_cache=True).past_key_values
    for given in (copy.deepcopy(cache), cache):
        assert (model(row[:, -1:], past_key_values=given).logits[:, -1] - want).abs().max() < 1e-4


def test_rows_of_several_adapters_wait_each_for_its_own_invocation() -> None:
    model = alora()
    model.add_adapter("other", config_for("alora", target_modules=["q_proj"], r=2, alora_invocation_tokens=[4],
                                          init_lora_weights=False))  # fmt: skip
    model.add_adapter("plain", config_for("lora", target_modules=["q_proj"], r=2, init_lora_weights=False))
    names = ["other", "default", "plain", "__base__"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    got = model(IDS, attention_mask=MASK, adapter_names=names).logits
    text = model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=names, **options)
    for i, name in enumerate(names[:3]):
        model.set_adapter(name)
        one = {"input_ids": IDS[i : i + 1], "attention_mask": MASK[i : i + 1]}
        assert (model(**one).logits[0] - got[i])[MASK[i] > 0].abs().max() < 1e-4
        assert torch.equal(model.generate(**one, **options)[0], text[i])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_when_layers_are_computed_again(reentrant: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        model = alora().train()
        if again:
            checkpoint_activations(model.get_base_model(), {"use_reentrant": reentrant})
            model.get_base_model().enable_input_require_grads()
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g.abs().max() > 0 for g in found[0].values()) and len(found[0]) == 12
    assert all((found[1][n] - g).abs().max() < 1e-6 for n, g in found[0].items())


def test_a_second_forward_before_the_backward_is_an_error_when_layers_are_computed_again() -> None:
    model = alora().train()
    checkpoint_activations(model.get_base_model())
    losses = [model(ids, labels=ids).loss for ids in (IDS[:2], IDS[2:])]
    with pytest.raises(TrainingError, match="before the next forward"):
        sum(losses).backward()


def test_what_cannot_be_right_is_refused() -> None:
    model = alora()
    with pytest.raises(NotMergeable, match="some tokens"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, 16))
    with pytest.raises(NotSupported, match="packed"):
        model(IDS[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    with pytest.raises(NotSupported, match="CAUSAL_LM"):
        alora(task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="token ids"):
        alora(alora_invocation_tokens=["<|go|>"])

"""What holds for every prompt method: `generate` is greedy decoding by repeated forward, with and without cache."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import prompt_methods, randomise, variations
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import PeftConfig, config_for, load
from trimtab.errors import ConfigError, NotMergeable, NotSupported

NEW = 6


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip


def gpt2() -> Any:
    sizes: dict[str, Any] = dict(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0))


def t5() -> Any:
    sizes: dict[str, Any] = dict(vocab_size=37, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    sizes["tie_word_embeddings"] = False
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None))


MODELS = {"llama": llama, "gpt2": gpt2, "t5": t5}
methods = pytest.mark.parametrize("method", prompt_methods())
causal = pytest.mark.parametrize("name", ["llama", "gpt2"])


def base(name: str) -> Any:
    torch.manual_seed(0)
    made = MODELS[name]().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4 if p.dim() > 1 and name != "t5" else 1)  # sharp enough that greedy choices differ
        if name == "t5":
            for n, p in made.named_parameters():
                if "EncDecAttention" in n or n.endswith("lm_head.weight"):
                    p.normal_(std=0.5)
    return made


def config(method: str, name: str, **options: Any) -> PeftConfig:
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    return config_for(method, **load(method).small | {"task_type": task} | options)


def _sort() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    fits: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for method in prompt_methods():
        for name in MODELS:
            try:
                get_peft_model(base(name), config(method, name))
                fits.append((method, name))
            except NotSupported:
                refused.append((method, name))
    return fits, refused


FITS, REFUSED = _sort()
every = pytest.mark.parametrize(("method", "name"), FITS, ids=lambda v: v)


def prompted(method: str, name: str, **options: Any) -> PeftModel:
    model = get_peft_model(base(name), config(method, name, **options)).eval()
    randomise(model, size=0.5)
    return model


@pytest.mark.parametrize(("method", "name"), REFUSED, ids=lambda v: v)
def test_only_encoder_decoder_models_are_refused(method: str, name: str) -> None:
    assert name == "t5" and {(method, n) for n in ("llama", "gpt2")} <= set(FITS)


OPTIONS = [(m, o) for m in prompt_methods() for o in variations(m) if o]


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=str)
def test_each_option_generates_as_it_answers_and_is_saved(method: str, options: Any, tmp_path: Path) -> None:
    model, (ids, mask) = prompted(method, "llama", **dict(options)), batch()
    got = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, greedy(model, "llama", ids, mask))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("llama"), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def batch() -> tuple[Tensor, Tensor]:
    """Three rows, padded on the left by 0, 3 and 5."""
    ids = torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def greedy(model: Any, name: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The definition: the most likely token of a whole forward, put at the end, again and again."""
    out = torch.zeros(len(ids), 1, dtype=torch.long) if name == "t5" else ids
    for _ in range(NEW):
        with torch.no_grad():
            if name == "t5":
                logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=out).logits
            else:
                logits = model(input_ids=out, attention_mask=mask, use_cache=False).logits
        out = torch.cat([out, logits[:, -1].argmax(-1, keepdim=True)], 1)
        if mask is not None and name != "t5":
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return out


@every
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_generate_is_greedy_decoding_by_repeated_forward(method: str, name: str, use_cache: bool) -> None:
    model, ids = prompted(method, name), batch()[0][:1]
    want = greedy(model, name, ids, None)
    got = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    assert torch.equal(got, want)
    assert not torch.equal(want, greedy(base(name), name, ids, None))  # the prompt has a say
    once = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=use_cache
    )
    assert torch.equal(once, want)


@every
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_left_padded_rows_generate_what_each_does_alone(method: str, name: str, use_cache: bool) -> None:
    model, (ids, mask) = prompted(method, name), batch()
    got = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    for row in range(len(ids)):
        start = int((mask[row] == 0).sum())
        if name == "t5" and start:
            continue  # T5 counts its positions over padding, with or without a prompt
        alone = greedy(model, name, ids[row : row + 1, start:], None)
        assert torch.equal(got[row, -NEW:], alone[0, -NEW:])
    assert torch.equal(got, greedy(model, name, ids, mask))


@methods
@causal
def test_a_cached_step_has_the_logits_of_the_whole(method: str, name: str) -> None:
    model, ids = prompted(method, name), batch()[0][:1]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -3:]
        out = model(input_ids=ids[:, :-3], use_cache=True)
        parts = []
        for i in range(3):
            at = ids.shape[1] - 3 + i
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


@methods
@causal
def test_padding_does_not_change_a_row_s_logits(method: str, name: str) -> None:
    model, (ids, mask) = prompted(method, name), batch()
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row in range(3):
            start = int((mask[row] == 0).sum())
            alone = model(input_ids=ids[row : row + 1, start:]).logits
            assert (together[row, -(7 - start) :] - alone[0, -(7 - start) :]).abs().max() < 1e-4


@methods
@causal
def test_the_loss_counts_the_labels_and_no_virtual_token(method: str, name: str) -> None:
    model, ids = prompted(method, name), batch()[0][:1]
    out = model(input_ids=ids, labels=ids)
    first = 0 if out.logits.shape[1] > 7 else 1  # a virtual token before the input predicts its first token
    want = torch.nn.functional.cross_entropy(out.logits[0, first - 8 : -1], ids[0, first:])
    assert (out.loss - want).abs() < 1e-5
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads and all("prompt_encoder" in n and g.abs().max() > 0 for n, g in grads.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(grads)


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_hooks_to_its_own_group(method: str, name: str, how: str) -> None:
    model, ids = prompted(method, name), batch()[0]
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    call = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if name == "t5" else {})
    with torch.no_grad():
        y, bare = model(**call).logits, base(name)(**call).logits
        assert torch.equal(other(**call).logits, y)
        randomise(other, seed=11, size=1.0)
        assert torch.equal(model(**call).logits, y)
        assert (other(**call).logits - y).abs().max() > 1e-3
        with other.disable_adapter():
            assert torch.equal(model(**call).logits, y) and torch.equal(other(**call).logits, bare)
        other.delete_adapter("default")
        assert torch.equal(model(**call).logits, y)


@every
def test_disabled_and_unloaded_are_the_base_bit_for_bit(method: str, name: str) -> None:
    model, ids = prompted(method, name), batch()[0]
    call = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if name == "t5" else {})
    with torch.no_grad():
        y, bare = model(**call).logits, base(name)(**call).logits
        with model.disable_adapter():
            assert torch.equal(model(**call).logits, bare)
        assert torch.equal(model(**call).logits, y) and not torch.equal(y[:, -1], bare[:, -1])
        with pytest.raises(NotMergeable, match="prompt method"):
            model.merge_adapter()
        assert torch.equal(model.unload()(**call).logits, bare)


@every
def test_saved_and_loaded_is_bit_equal(method: str, name: str, tmp_path: Path) -> None:
    model, ids = prompted(method, name), batch()[0]
    call = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if name == "t5" else {})
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        again = PeftModel.from_pretrained(base(name), tmp_path, is_trainable=trainable).eval()
        assert torch.equal(again(**call).logits, model(**call).logits)
        assert any(p.requires_grad for p in again.parameters()) == trainable


@pytest.mark.parametrize("pair", [(a, b) for a in prompt_methods() for b in prompt_methods()], ids="-".join)
def test_two_prompt_adapters_are_switched_and_never_both_on(pair: tuple[str, str]) -> None:
    model, ids = prompted(pair[0], "llama"), batch()[0]
    with torch.no_grad():
        first = model(input_ids=ids).logits
        model.add_adapter("other", config(pair[1], "llama"))
        assert torch.equal(model(input_ids=ids).logits, first)  # not active yet
        model.set_adapter("other")
        randomise(model, seed=13, size=0.5)
        second = model(input_ids=ids).logits
        assert (second[:, -1] - first[:, -1]).abs().max() > 1e-3
        model.set_adapter("default")
        assert torch.equal(model(input_ids=ids).logits, first)
        with pytest.raises(ConfigError, match="one can be active"):
            model.set_adapter(["default", "other"])
        assert model.active_adapters == ["default"] and torch.equal(model(input_ids=ids).logits, first)
        model.set_adapter("other")
        model.delete_adapter("default")
        assert torch.equal(model(input_ids=ids).logits, second)


@methods
def test_a_prompt_stands_beside_a_layer_method(method: str) -> None:
    model, ids = prompted(method, "llama"), batch()[0]
    model.add_adapter("low", config_for("lora", r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        model.set_adapter(["default", "low"])
        both = model(input_ids=ids).logits
        assert (both - alone).abs().max() > 1e-3
        model.merge_adapter(["low"])
        assert (model(input_ids=ids).logits - both).abs().max() < 1e-4
        model.unmerge_adapter()
        model.set_adapter("default")
        assert torch.equal(model(input_ids=ids).logits, alone)


@methods
def test_keyword_and_positional_calls_and_embeddings_are_one(method: str) -> None:
    model, ids = prompted(method, "llama"), batch()[0]
    with torch.no_grad():
        y = model(input_ids=ids).logits
        assert torch.equal(model(ids).logits, y)
        embeds = model.get_base_model().get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, y)

"""A 4-bit Llama: the same adapters on the same quantised weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import close, configs, exchange, inputs, logits, move, quiet_peft
from torch import nn

import trimtab
from trimtab.core.base import port

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, quant: str = "nf4") -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
        ).eval()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 4}),
        ("lora", {"r": 4, "use_rslora": True}),
        ("ia3", {}),
        ("oft", {"oft_block_size": 8}),
        ("vera", {"r": 4}),
        ("prompt_tuning", {"num_virtual_tokens": 3}),
        ("prefix_tuning", {"num_virtual_tokens": 3}),
    ],
    ids=str,
)
def test_exchange_on_four_bit(method: str, options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    exchange("llama", *configs(method, "llama", **options), tmp_path, bound=2e-2, make=lambda _: load(folder))


def test_dora_on_four_bit_is_peft_s_on_the_weights_that_the_codes_stand_for(folder: Path, tmp_path: Path) -> None:
    """peft's own DoRA on 4 bit reads what bitsandbytes has repacked on a CPU with AVX512-BF16."""

    def dense(name: str) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model, quantised = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load(folder)
        with torch.no_grad():
            for path, layer in quantised.named_modules():
                if type(layer).__name__ == "Linear4bit":
                    model.get_submodule(path).weight.copy_(port(layer).weight())
        return model

    ours, theirs = configs("dora", "llama", r=4)
    exchange("llama", ours, theirs, tmp_path, bound=2e-2, make=lambda _: load(folder), for_peft=dense)


def test_counting_on_four_bit_is_peft_s(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = configs("lora", "llama")
    us = trimtab.get_peft_model(load(folder), ours)
    us.print_trainable_parameters()
    line = capsys.readouterr().out
    quiet_peft(load(folder), theirs).print_trainable_parameters()
    assert line == capsys.readouterr().out
    with torch.no_grad():  # counted the same when the weights have been used
        us(**inputs("llama"))
    us.print_trainable_parameters()
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_merging_after_a_forward_is_right_where_peft_s_merge_reads_repacked_weights(quant: str, folder: Path) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = load(folder, quant)
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    plain = port(layer).weight().clone()
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    us = trimtab.get_peft_model(model, configs("lora", "llama", r=4, target_modules=["q_proj"])[0])
    move(us)
    adapted: Any = us.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    assert ((adapted.port.weight() - plain).abs() <= 2**-8 * plain.abs()).all()  # packing rounds the block scales
    want = logits(us, "llama")
    merged = us.merge_and_unload()
    found: Any = merged.get_submodule("model.layers.0.self_attn.q_proj")
    A, B = (adapted.adapters["default"].find(n).weight for n in ("lora_A", "lora_B"))
    step = (port(found).weight() - plain - 2 * B @ A).abs().view(-1, 64).amax(1)
    assert (step <= 0.2 * (plain + 2 * B @ A).abs().view(-1, 64).amax(1)).all()
    assert torch.isfinite(logits(merged, "llama")).all() and (logits(merged, "llama") - want).abs().max() < 1


@pytest.mark.filterwarnings("error::FutureWarning")  # no name of transformers that it is about to drop
def test_checkpointed_training_on_four_bit_gives_the_same_gradients(folder: Path) -> None:
    batch = inputs("llama") | {"labels": inputs("llama")["input_ids"]}
    found = []
    for checkpointing in (False, True):
        model = trimtab.prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=checkpointing)
        us = trimtab.get_peft_model(model, configs("lora", "llama", r=4)[0]).train()
        move(us)
        us(**batch).loss.backward()
        found.append([p.grad for p in us.parameters() if p.requires_grad])
    assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert isinstance(peft.__version__, str) and close(found[0][0], found[1][0]) is None


@pytest.mark.parametrize(
    ("method", "options", "extra"),
    [
        ("hira", {"r": 4}, " "),
        ("pvera", {"r": 4}, " "),
        ("adalora", {"init_r": 4, "target_r": 2, "total_step": 9}, " "),
        ("vblora", {"num_vectors": 9, "vector_length": 32}, " "),
        ("gralora", {"r": 4, "alpha": 4}, " "),
        ("lily", {"r": 4}, " "),
        ("randlora", {"r": 8, "randlora_alpha": 8}, r"^base_model\.model\..*randlora_[AB]$"),
    ],
    ids=str,
)
def test_low_rank_updates_on_four_bit(
    method: str, options: dict[str, Any], extra: str, folder: Path, tmp_path: Path
) -> None:
    ours, theirs = configs(method, "llama", **options)
    exchange("llama", ours, theirs, tmp_path, bound=2e-2, make=lambda _: load(folder), extra=extra)


def test_unilora_acts_on_four_bit_where_peft_s_scales_are_rounded_to_whole_numbers(folder: Path) -> None:
    ours, theirs = configs("unilora", "llama", theta_d_length=8)
    plain, changes = logits(load(folder), "llama"), []
    for model in (trimtab.get_peft_model(load(folder), ours), quiet_peft(load(folder), theirs)):
        move(model, 0.3)
        changes.append((logits(model, "llama") - plain).abs().max())
    assert changes[0] > 1e-2 and changes[1] < 1e-6


@pytest.mark.parametrize(("method", "options"), [("peanut", {"init_weights": False}), ("deft", {})], ids=str)
def test_methods_of_the_weight_act_on_four_bit_where_peft_fails(method: str, options: dict[str, Any], folder: Path) -> None:
    ours, theirs = configs(method, "llama", r=4, **options)
    us = trimtab.get_peft_model(load(folder), ours)
    move(us, 0.3)
    layer = us.get_base_model().model.layers[0].self_attn.q_proj
    assert (layer.stack_.weight() - port(layer.base_layer).weight()).abs().max() > 1e-3
    x = torch.randn(3, 64)
    close(layer(x), x @ layer.stack_.weight().T, 2e-2)
    with pytest.raises((RuntimeError, TypeError)):
        logits(quiet_peft(load(folder), theirs), "llama")


def test_randlora_s_weight_on_four_bit_is_what_it_computes_where_peft_multiplies_the_other_way(folder: Path) -> None:
    ours, theirs = configs("randlora", "llama", r=16, target_modules=["o_proj"], randlora_alpha=16)
    errors = []
    for model in (trimtab.get_peft_model(load(folder), ours), quiet_peft(load(folder), theirs)):
        move(model, 0.1)
        layer = model.base_model.model.model.layers[0].self_attn.o_proj
        computed = (layer(torch.eye(64)) - layer.base_layer(torch.eye(64))).T
        meant = layer.get_delta_weight("default") if isinstance(model, peft.PeftModel) else None
        meant = layer.stack_.weight() - port(layer.base_layer).weight() if meant is None else meant
        errors.append(((computed - meant).abs().max() / computed.abs().max()).item())
    assert errors[0] < 0.02 and errors[1] > 0.1

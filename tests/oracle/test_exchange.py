"""All seven methods on four models: peft's adapters in our hands and ours in peft's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import base, close, configs, exchange, inputs, keys, logits, move, quiet_peft, same_settings

import trimtab

LINEAR = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"], "t5": ["q", "wo"]}
WEIGHT: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"r": 4, "lora_alpha": 16, "use_rslora": True}),
    ("lora", {"init_lora_weights": "gaussian", "lora_dropout": 0.5}),
    ("lora", {"init_lora_weights": False}),
    ("dora", {"r": 4, "lora_alpha": 8}),
    ("ia3", {}),
    ("vera", {"r": 8}),
    ("vera", {"r": 8, "save_projection": False, "projection_prng_key": 3, "d_initial": 0.5}),
]
ROTATIONS: list[dict[str, Any]] = [
    {"oft_block_size": 8},
    {"oft_block_size": 8, "use_cayley_neumann": False},
    {"oft_block_size": 8, "block_share": True},
    {"oft_block_size": 8, "num_cayley_neumann_terms": 7},
    {"oft_block_size": 8, "coft": True, "eps": 1.0, "use_cayley_neumann": False},
    {"r": 4, "oft_block_size": 0},
    {"oft_block_size": 7},  # no divisor: the nearest one is taken
]
show = lambda v: "-".join(f"{k}={x}" for k, x in v.items()) or "plain" if isinstance(v, dict) else str(v)  # noqa: E731


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize(("method", "options"), WEIGHT, ids=show)
def test_exchange(method: str, options: dict[str, Any], model: str, tmp_path: Path) -> None:
    exchange(model, *configs(method, model, **options), tmp_path)


@pytest.mark.parametrize("options", ROTATIONS, ids=show)
def test_exchange_oft(options: dict[str, Any], tmp_path: Path) -> None:
    exchange("llama", *configs("oft", "llama", target_modules=LINEAR["llama"], **options), tmp_path)


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_exchange_oft_on_other_models(model: str, tmp_path: Path) -> None:
    exchange(model, *configs("oft", model, target_modules=LINEAR[model], oft_block_size=8), tmp_path)


def test_three_terms_of_the_cayley_series_are_three_where_peft_takes_four() -> None:
    ours, theirs = configs("oft", "llama", target_modules=["q_proj"], oft_block_size=8, num_cayley_neumann_terms=3)
    model = trimtab.get_peft_model(base("llama"), ours)
    move(model)
    adapter = model.get_base_model().model.layers[0].self_attn.q_proj.adapters["default"]
    v = adapter.oft_R.weight.detach()
    i, j = torch.triu_indices(8, 8, 1)
    Q = torch.zeros(len(v), 8, 8)
    Q[:, i, j], Q[:, j, i] = v, -v
    close(adapter.rotation(), torch.eye(8) + 2 * Q + Q @ Q, 1e-6)
    assert theirs.num_cayley_neumann_terms == 3


PATTERNS: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6}, "alpha_pattern": {"layers.0.self_attn.v_proj": 32}},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": "all-linear", "r": 2},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]  # fmt: skip


@pytest.mark.parametrize("options", PATTERNS, ids=show)
def test_exchange_of_what_a_config_picks(options: dict[str, Any], tmp_path: Path) -> None:
    exchange("llama", *configs("lora", "llama", **options), tmp_path)


@pytest.mark.parametrize(("model", "bias"), [("gpt2", "all"), ("gpt2", "lora_only"), ("bert", "lora_only")])
def test_exchange_of_trained_biases(bias: str, model: str, tmp_path: Path) -> None:
    exchange(model, *configs("lora", model, bias=bias), tmp_path)


def test_modules_to_save_names_whole_path_parts_where_peft_takes_any_ending(tmp_path: Path) -> None:
    ours, theirs = configs("lora", "llama", modules_to_save=["norm"])
    trimtab.get_peft_model(base("llama"), ours).save_pretrained(tmp_path / "ours")
    quiet_peft(base("llama"), theirs).save_pretrained(str(tmp_path / "theirs"))
    norms = [{k for k in keys(tmp_path / who) if "norm" in k} for who in ("ours", "theirs")]
    assert norms[0] == {"base_model.model.model.norm.weight"} and len(norms[1]) == 5


def test_biases_beside_a_head_are_saved_once_where_peft_writes_keys_that_no_one_reads(tmp_path: Path) -> None:
    ours, theirs = configs("lora", "bert", bias="all")
    us, them = trimtab.get_peft_model(base("bert"), ours), quiet_peft(base("bert"), theirs)
    move(us)
    us.save_pretrained(tmp_path / "ours")
    them.save_pretrained(str(tmp_path / "theirs"))
    odd = {"base_model.model.classifier.modules_to_save.bias", "base_model.model.classifier.original_module.bias"}
    assert keys(tmp_path / "theirs").keys() - keys(tmp_path / "ours").keys() == odd
    assert keys(tmp_path / "ours").keys() <= keys(tmp_path / "theirs").keys()
    close(logits(trimtab.PeftModel.from_pretrained(base("bert"), tmp_path / "ours"), "bert"), logits(us, "bert"), 0)


@pytest.mark.parametrize("model", ["gpt2", "bert", "llama"])
def test_exchange_of_a_bias_on_b(model: str, tmp_path: Path) -> None:
    exchange(model, *configs("lora", model, lora_bias=True, lora_alpha=32), tmp_path)


def test_exchange_of_an_embedding_adapter(tmp_path: Path) -> None:
    """peft writes the whole frozen embedding beside it unless told not to; both forms are read."""
    ours, theirs = configs("lora", "gpt2", target_modules=["wte", "c_attn"], r=4)
    exchange("gpt2", ours, theirs, tmp_path)
    ours, theirs = configs("lora", "llama", target_modules=["embed_tokens"], r=4)
    them = quiet_peft(base("llama"), theirs)
    move(them)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        them.save_pretrained(tmp_path / "whole")
    assert any("base_layer" in k for k in keys(tmp_path / "whole"))
    close(logits(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "whole"), "llama"), logits(them, "llama"))


@pytest.mark.parametrize("method", ["dora", "oft"])
def test_exchange_of_an_embedding_adapter_of_another_method(method: str, tmp_path: Path) -> None:
    small = {"r": 4} if method == "dora" else {"oft_block_size": 8}
    exchange("gpt2", *configs(method, "gpt2", target_modules=["wte"], **small), tmp_path)


def test_exchange_of_named_feedforward_layers(tmp_path: Path) -> None:
    names: dict[str, Any] = dict(
        target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["up_proj", "down_proj"]
    )
    exchange("llama", *configs("ia3", "llama", **names), tmp_path)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("n", [1, 5])
def test_exchange_prompt_tuning(model: str, n: int, tmp_path: Path) -> None:
    exchange(model, *configs("prompt_tuning", model, num_virtual_tokens=n), tmp_path)


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"prefix_projection": True}, {"prefix_projection": True, "encoder_hidden_size": 12}], ids=show
)
def test_exchange_prefix_tuning(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    exchange(model, *configs("prefix_tuning", model, num_virtual_tokens=4, **options), tmp_path)


def test_prefix_tuning_refuses_encoders_as_peft_does() -> None:
    ours, theirs = configs("prefix_tuning", "bert", num_virtual_tokens=4)
    with pytest.raises(trimtab.errors.NotSupported, match="encoder"):
        trimtab.get_peft_model(base("bert"), ours)
    with pytest.raises(ValueError):
        logits(quiet_peft(base("bert"), theirs), "bert")


def test_several_adapters_in_one_folder_travel_both_ways(tmp_path: Path) -> None:
    first, theirs_first = configs("lora", "llama", r=4)
    second, theirs_second = configs("lora", "llama", r=2, target_modules=["o_proj", "q_proj"])
    us, them = trimtab.get_peft_model(base("llama"), first), quiet_peft(base("llama"), theirs_first)
    us.add_adapter("second", second)
    them.add_adapter("second", theirs_second)
    for model, folder in ((us, tmp_path / "ours"), (them, tmp_path / "theirs")):
        for name in ("default", "second"):
            model.set_adapter(name)
            move(model)
        model.save_pretrained(str(folder))
    for name in ("", "second"):
        assert keys(tmp_path / "ours" / name) == keys(tmp_path / "theirs" / name)
        same_settings(tmp_path / "ours" / name, tmp_path / "theirs" / name)
    read = trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "theirs")
    read.load_adapter(tmp_path / "theirs", "second", subfolder="second")
    back = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "ours"))
    back.load_adapter(str(tmp_path / "ours" / "second"), "second")
    for names in (["default"], ["second"], ["default", "second"]):
        for a, b in ((read, them), (us, back)):
            a.set_adapter(names)
            b.base_model.set_adapter(names)
            close(logits(a, "llama"), logits(b, "llama"))
    only = trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "theirs", subfolder="second")
    them.set_adapter("second")
    close(logits(only, "llama"), logits(them, "llama"))


def test_an_adapter_named_as_a_path_part_loses_nothing_where_peft_drops_a_layer(tmp_path: Path) -> None:
    ours, theirs = configs("lora", "llama")
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    us.add_adapter("0", configs("lora", "llama")[0])
    them.add_adapter("0", configs("lora", "llama")[1])
    us.save_pretrained(tmp_path / "ours")
    them.save_pretrained(str(tmp_path / "theirs"))
    assert len(keys(tmp_path / "ours")) == len(keys(tmp_path / "ours" / "0")) == 8
    assert len(keys(tmp_path / "theirs")) == 4


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "oft"])
def test_merged_is_what_peft_merges(method: str) -> None:
    small = {"oft_block_size": 8} if method == "oft" else {}
    ours, theirs = configs(method, "llama", target_modules=["q_proj", "down_proj"], **small)
    them = quiet_peft(base("llama"), theirs)
    move(them)
    us = trimtab.get_peft_model(base("llama"), ours)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    a, b = us.merge_and_unload(), them.merge_and_unload()
    want = b.state_dict()
    assert a.state_dict().keys() == want.keys()
    for key, value in a.state_dict().items():
        close(value, want[key], 1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"r": 4, "bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"}],
    ids=show,
)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_printed_line_is_peft_s(options: dict[str, Any], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = configs("lora", model, **options)
    trimtab.get_peft_model(base(model), ours).print_trainable_parameters()
    us = capsys.readouterr().out
    quiet_peft(base(model), theirs).print_trainable_parameters()
    them = capsys.readouterr().out
    if options.get("bias"):  # we train a copy, so that disabling gives the base back; peft trains the base's own bias
        us, them = (line.partition("||")[0] for line in (us, them))
    assert us == them and us.startswith("trainable params: ")


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_gradients_are_peft_s(method: str) -> None:
    small = {"r": 4} if method != "ia3" else {}
    ours, theirs = configs(method, "llama", target_modules=["q_proj", "v_proj"], **small)
    them = quiet_peft(base("llama"), theirs)
    move(them)
    us = trimtab.get_peft_model(base("llama"), ours).eval()
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    batch = inputs("llama") | {"labels": inputs("llama")["input_ids"]}
    losses = [m(**batch).loss for m in (us, them)]
    close(*losses, bound=1e-6)
    for loss in losses:
        loss.backward()
    grads = {k: v.grad for k, v in them.named_parameters() if v.grad is not None}
    theirs_by_key = {k.replace(".default", "").removesuffix(".weight"): g for k, g in grads.items()}
    model = us.get_base_model()
    seen = 0
    for path, adapter in model.trimtab_groups["default"].sites():
        for key, p in adapter.named_parameters():
            name = adapter.published(key).removesuffix(".weight")
            close(p.grad, theirs_by_key[f"base_model.model.{path}.{name}"], 1e-5)
            seen += 1
    assert seen == len(grads) > 0

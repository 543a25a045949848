"""Weights that are no layer's: experts in one slab, attention with its projections inside; peft's folders and ours."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import close, configs, exchange, inputs, keys, move, quiet_peft
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import trimtab
from trimtab.errors import ConfigError, NoMatch, NotMergeable, NotSupported

SIZES: dict[str, Any] = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, pad_token_id=0, num_experts_per_tok=2, head_dim=8,
)  # fmt: skip
MOE: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen3": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=12)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3)),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def moe(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = MOE[name]().eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return made


def logits(model: Any, name: str) -> Tensor:
    mask = inputs("llama")["attention_mask"]
    with torch.no_grad():
        return model.eval()(**inputs("llama")).logits * mask[..., None]


def pair(method: str = "lora", **options: Any) -> tuple[Any, Any]:
    return configs(method, "llama", **{"target_modules": [], "r": 3} | options)


@pytest.mark.parametrize("name", [*MOE])
@pytest.mark.parametrize("options", [
    {"target_parameters": BOTH},
    {"target_parameters": ["mlp.experts.down_proj"], "use_rslora": True, "lora_alpha": 5},
    {"target_parameters": BOTH, "target_modules": ["q_proj"], "rank_pattern": {"experts.down_proj": 2}},
    {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"], "init_lora_weights": False},
], ids=lambda o: "-".join(o))  # fmt: skip
def test_exchange_of_experts(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    loaded = exchange(name, *pair(**options), tmp_path, make=moe, answer=logits)
    want = logits(loaded, name)
    original = {k: v.clone() for k, v in loaded.state_dict().items() if "base_layer" in k}
    loaded.merge_adapter(safe_merge=True)
    close(logits(loaded, name), want)
    loaded.unmerge_adapter()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in original.items()) and original
    assert torch.equal(logits(loaded, name), want)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, name), logits(moe(name), name))
    merged = loaded.merge_and_unload()
    close(logits(merged, name), want)
    assert merged.state_dict().keys() == moe(name).state_dict().keys()


def test_exchange_of_a_router_and_of_a_layer_s_weight(tmp_path: Path) -> None:
    exchange("mixtral", *pair(target_parameters=["gate.weight", "o_proj.weight"]), tmp_path, make=moe, answer=logits)


def test_each_expert_has_its_own_product() -> None:
    model = trimtab.get_peft_model(moe("qwen3"), pair(target_parameters=BOTH, lora_alpha=6)[0])
    move(model)
    layer: Any = model.get_base_model().model.layers[0].mlp.experts
    W, r, E = layer.base_layer.down_proj, 3, 3
    A, B = (dict(layer.adapters["default"].named_parameters())[f"parts.1.each.lora_{x}.weight"] for x in "AB")
    want = torch.stack([W[e] + 2 * B[:, e::E] @ A[e * r : (e + 1) * r] for e in range(E)])
    close(layer.adapters["default"].tensors(layer.port)["down_proj"], want, 1e-6)


def test_several_adapters_on_experts_add_up_and_merge_apart() -> None:
    ours, theirs = pair(target_parameters=BOTH)
    them = quiet_peft(moe("mixtral"), theirs)
    them.add_adapter("b", copy.deepcopy(theirs))
    them.base_model.set_adapter(["default", "b"])
    move(them)
    us = trimtab.get_peft_model(moe("mixtral"), ours)
    us.add_adapter("b", copy.deepcopy(ours))
    for name in ("default", "b"):
        trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them, adapter_name=name), name)
    us.set_adapter(["default", "b"])
    want = logits(them, "")
    close(logits(us, ""), want)
    us.merge_adapter(["b"])
    close(logits(us, ""), want)
    us.unmerge_adapter()
    close(logits(us, ""), want)


def test_gradients_of_experts_are_peft_s_with_and_without_recomputation() -> None:
    ours, theirs = pair(target_parameters=BOTH)
    them = quiet_peft(moe("mixtral"), theirs)
    move(them)
    batch = inputs("llama") | {"labels": inputs("llama")["input_ids"]}
    them(**batch).loss.backward()
    want = {k.replace(".default", ""): p.grad for k, p in them.named_parameters() if p.grad is not None}
    for again in (False, True):
        us = trimtab.get_peft_model(moe("mixtral"), ours)
        trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
        if again:
            us.train()
            trimtab.model.checkpoint_activations(us.get_base_model())
        us(**batch).loss.backward()
        for path, adapter in us.get_base_model().trimtab_groups["default"].sites():
            for key, p in adapter.named_parameters():
                close(p.grad, want.pop(f"base_model.model.{path}.{adapter.published(key)}") if again
                      else want[f"base_model.model.{path}.{adapter.published(key)}"])  # fmt: skip
    assert not want


def test_dora_on_experts_where_peft_refuses(tmp_path: Path) -> None:
    ours, theirs = pair(target_parameters=BOTH, use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        quiet_peft(moe("mixtral"), theirs)
    us = trimtab.get_peft_model(moe("mixtral"), ours)
    close(logits(us, ""), logits(moe("mixtral"), ""))
    move(us)
    layer: Any = us.get_base_model().model.layers[0].mlp.experts
    new, old = layer.adapters["default"].tensors(layer.port)["down_proj"], layer.base_layer.down_proj
    a = dict(layer.adapters["default"].named_parameters())
    A, B, m = (a[f"parts.1.each.{n}"] for n in ("lora.lora_A.weight", "lora.lora_B.weight", "lora_magnitude_vector.weight"))
    V = old[2] + us.peft_config["default"].lora_alpha / 3 * B[:, 2::3] @ A[6:]
    close(new[2], m[2][:, None] * V / V.norm(dim=1, keepdim=True), 1e-6)
    us.save_pretrained(tmp_path)
    assert torch.equal(logits(trimtab.PeftModel.from_pretrained(moe("mixtral"), tmp_path), ""), logits(us, ""))


def test_bfloat16_experts_carry_float32_adapters() -> None:
    us = trimtab.get_peft_model(moe("mixtral").bfloat16(), pair(target_parameters=BOTH)[0])
    assert {p.dtype for p in us.parameters() if p.requires_grad} == {torch.float32}
    move(us)
    y = logits(us, "")
    us.merge_adapter()
    assert y.dtype == torch.bfloat16 and torch.equal(logits(us, ""), y)


def test_what_experts_cannot_carry_is_refused() -> None:
    for options in ({"lora_dropout": 0.1}, {"lora_bias": True}):
        with pytest.raises(NotSupported, match=r"experts\.gate_up_proj"):
            trimtab.get_peft_model(moe("mixtral"), pair(target_parameters=BOTH, **options)[0])
    with pytest.raises(NoMatch, match="gate_up_proj"):
        trimtab.get_peft_model(moe("mixtral"), pair(target_parameters=["experts.gateup_proj"])[0])
    with pytest.raises(ConfigError, match="list of path ends"):
        trimtab.get_peft_model(moe("mixtral"), trimtab.LoraConfig(target_parameters="experts.down_proj"))
    with pytest.raises(ConfigError, match="leave out one of the two"):
        trimtab.get_peft_model(moe("mixtral"), pair(target_parameters=["q_proj.weight"], target_modules=["q_proj"])[0])
    model = moe("mixtral")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.experts.down_proj = nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotSupported, match=r"uint8.*unquantised"):
        trimtab.get_peft_model(model, pair(target_parameters=BOTH)[0])
    model = moe("mixtral")
    for layer in model.model.layers:  # type: ignore[union-attr]
        nn.utils.parametrize.register_parametrization(layer.mlp.experts, "down_proj", nn.Identity())
    with pytest.raises(NotSupported, match=r"down_proj.*4-bit"):
        trimtab.get_peft_model(model, pair(target_parameters=BOTH)[0])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])


def attending(_: str = "") -> nn.Module:
    torch.manual_seed(0)
    return Attending().eval()


def answer(model: Any, _: str = "") -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("options", [{}, {"target_modules": ["attn", "out"], "rank_pattern": {"attn": 2}, "use_rslora": True}])
def test_attention_has_peft_s_keys_and_its_output_projection_counts_once(options: dict[str, Any], tmp_path: Path) -> None:
    """peft adds the change of the output projection twice: with half of it there, the two are equal."""
    ours, theirs = pair(**{"target_modules": ["attn"]} | options)
    ours.task_type = theirs.task_type = None
    them = quiet_peft(attending(), theirs)
    move(them)
    state = {k: v.clone() for k, v in peft.get_peft_model_state_dict(them).items()}
    key = "base_model.model.attn.base_layer.out_proj.lora_B.weight"
    us = trimtab.get_peft_model(attending(), ours)
    us.save_pretrained(tmp_path / "ours")
    them.save_pretrained(str(tmp_path / "theirs"))
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs") and key in state
    trimtab.set_peft_model_state_dict(us, state)
    assert (answer(us) - answer(them)).abs().max() > 1e-3
    read = trimtab.PeftModel.from_pretrained(attending(), tmp_path / "theirs")
    assert torch.equal(answer(read), answer(us))
    a, b = us.get_base_model().attn, us.get_base_model().attn.adapters["default"]
    A, B = state["base_model.model.attn.base_layer.out_proj.lora_A.weight"], state[key]
    s = b.parts[1].s
    close(b.tensors(a.port)["out_proj.weight"], a.base_layer.out_proj.weight + s * B @ A, 1e-6)
    state[key] *= 2
    trimtab.set_peft_model_state_dict(us, state)
    close(answer(us), answer(them))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(attending(), str(tmp_path / "ours")).eval()
    close(answer(back), answer(attending()))


def test_merged_attention_unmerges_exactly_where_peft_s_comes_near() -> None:
    ours, _ = pair(target_modules=["attn"])
    us = trimtab.get_peft_model(attending(), ours)
    move(us)
    y, w = answer(us), us.get_base_model().attn.base_layer.in_proj_weight
    us.merge_adapter()
    assert (us.get_base_model().attn.base_layer.in_proj_weight - w).abs().max() > 1e-3
    close(answer(us), y)
    us.unmerge_adapter()
    assert us.get_base_model().attn.base_layer.in_proj_weight is w and torch.equal(answer(us), y)


def test_what_attention_cannot_carry_is_refused() -> None:
    with pytest.raises(NotSupported, match="dropout acts on the input"):
        trimtab.get_peft_model(attending(), pair(target_modules=["attn"], lora_dropout=0.1)[0])
    with pytest.raises(NotSupported, match="reads this weight past the layer"):
        trimtab.get_peft_model(attending(), pair(target_modules=["out_proj"])[0])


def test_an_adapter_of_a_layer_and_one_of_its_weight_stack_but_merge_one_by_one() -> None:
    us = trimtab.get_peft_model(attending(), pair(target_parameters=["out.weight"])[0])
    us.add_adapter("b", pair(target_modules=["out"])[0])
    us.set_adapter(["default", "b"])
    move(us)
    y = answer(us)
    with pytest.raises(NotMergeable, match="several weights"):
        us.merge_adapter()
    for name in ("default", "b"):
        us.merge_adapter([name])
        close(answer(us), y)
        us.unmerge_adapter()
        assert torch.equal(answer(us), y)
    us.set_adapter(["b", "default"])
    with pytest.raises(NotSupported, match="LoRA beneath"):
        answer(us)


def test_a_bias_on_b_acts_inside_attention() -> None:
    us = trimtab.get_peft_model(attending(), pair(target_modules=["attn"], lora_bias=True)[0])
    move(us)
    y, layer = answer(us), us.get_base_model().attn
    b = layer.adapters["default"].parts[0]
    close(layer.adapters["default"].tensors(layer.port)["in_proj_bias"], layer.base_layer.in_proj_bias + b.s * b.lora_B.bias)
    close(answer(us.merge_and_unload()), y)

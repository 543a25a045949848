"""Which layers a config names: every way of naming, and every way of naming nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_llama import llama
from test_adapters import lora
from torch import nn

from trimtab import IA3Config, LoraConfig, get_peft_model
from trimtab.core.group import adapted
from trimtab.errors import ConfigError, NoMatch, NotSupported, TrimtabWarning

L0, L1 = "model.layers.0.", "model.layers.1."
ATTENTION = [f"self_attn.{n}_proj" for n in "qkvo"]
ALL = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def sites(model: nn.Module, config: Any) -> list[str]:
    return [name for name, _ in adapted(get_peft_model(model, config).get_base_model())]


NAMED: list[tuple[dict[str, Any], list[str]]] = [
    ({"target_modules": ["q_proj"]}, [f"{l}self_attn.q_proj" for l in (L0, L1)]),
    ({"target_modules": ["layers.1.self_attn.q_proj"]}, [f"{L1}self_attn.q_proj"]),
    ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, [f"{L1}mlp.up_proj", f"{L1}mlp.down_proj"]),
    ({"target_modules": "all-linear"}, [f"{l}{n}" for l in (L0, L1) for n in ALL]),
    ({"target_modules": "ALL-LINEAR", "exclude_modules": r".*mlp.*"}, [f"{l}{n}" for l in (L0, L1) for n in ATTENTION]),
    (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.v_proj"]},
        [f"{L0}{ATTENTION[0]}", f"{L1}{ATTENTION[0]}", f"{L1}{ATTENTION[2]}"],
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, [f"{L1}self_attn.q_proj"]),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, [f"{L0}self_attn.q_proj"]),
    ({"target_modules": None}, [f"{l}{n}" for l in (L0, L1) for n in (ATTENTION[0], ATTENTION[2])]),
    ({"target_modules": ["embed_tokens", "lm_head"]}, ["model.embed_tokens", "lm_head"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "want"), NAMED, ids=lambda v: str(v)[:60])
def test_a_config_names_these_layers(fields: dict[str, Any], want: list[str]) -> None:
    assert sites(llama(), lora(**fields)) == want


NOTHING: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_prj"]}, r"'q_prj'\. Did you mean 'q_proj'\? .*q_proj \(2\)"),
    ({"target_modules": ["q_proj", "nothing"]}, "no module matches target 'nothing'"),
    ({"target_modules": "q_proj"}, "no module matches target 'q_proj'"),  # a string is a regex for the whole path
    ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform=\[7\]"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules"),
    ({"rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj' matches none of the 4"),
    ({"alpha_pattern": {"q_proj": 4, "x": 1}}, "alpha_pattern: 'x' matches none"),
    ({"modules_to_save": ["lm_haed"]}, "'lm_haed'. Did you mean 'lm_head'"),
    ({"target_modules": []}, "no module"),
]


@pytest.mark.parametrize(("fields", "message"), NOTHING, ids=lambda v: str(v)[:60])
def test_what_names_nothing_says_so_and_changes_nothing(fields: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(NoMatch, match=message):
        get_peft_model(model, lora(**fields))
    assert not model.__dict__.get("trimtab_groups") and all(p.requires_grad for p in model.parameters())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_wrong_regex_and_layers_with_a_regex_are_errors_of_the_config() -> None:
    with pytest.raises(ConfigError, match="is a regex"):
        get_peft_model(llama(), lora(target_modules="*q_proj"))
    with pytest.raises(ConfigError, match="layers_to_transform goes with a list"):
        get_peft_model(llama(), lora(target_modules=".*q_proj", layers_to_transform=[0]))


def test_layers_that_carry_no_weight_are_refused() -> None:
    with pytest.raises(NotSupported, match="LlamaMLP"):
        get_peft_model(llama(), lora(target_modules=["mlp"]))


def test_an_unknown_model_type_gets_all_linear_and_a_line_saying_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.warns(TrimtabWarning, match="none known for model type"):
        assert sites(model, LoraConfig(r=2)) == ["0", "2"]


def test_the_patterns_set_rank_and_scale() -> None:
    model = get_peft_model(
        llama(),
        lora(
            r=2,
            lora_alpha=6,
            rank_pattern={"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 5},
            alpha_pattern={"layers.0.self_attn.v_proj": 9},
        ),
    )
    found = {
        n: (a.adapters["default"].lora_A.weight.shape[0], a.adapters["default"].s)
        for n, a in adapted(model.get_base_model())
    }
    assert found == {
        f"{L0}self_attn.q_proj": (2, 3.0),
        f"{L0}self_attn.v_proj": (3, 3.0),
        f"{L1}self_attn.q_proj": (5, 6 / 5),
        f"{L1}self_attn.v_proj": (3, 2.0),
    }


def test_a_multihead_attention_s_projection_is_refused_by_name_and_left_alone_by_all_linear() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    with pytest.raises(NotSupported, match="MultiheadAttention reads this weight past the layer"):
        get_peft_model(Block(), LoraConfig(target_modules=["out_proj"]))
    assert sites(Block(), LoraConfig(target_modules="all-linear")) == ["linear"]


def test_the_config_that_is_saved_names_the_layers_itself() -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    get_peft_model(llama(), config)
    assert config.target_modules == ["q_proj", "v_proj"]
    ia3 = IA3Config(task_type="CAUSAL_LM")
    get_peft_model(llama(), ia3)
    assert (ia3.target_modules, ia3.feedforward_modules) == (["k_proj", "v_proj", "down_proj"], ["down_proj"])
    own = IA3Config(target_modules=["q_proj", "mlp.down_proj"])
    model = get_peft_model(llama(), own)
    assert own.feedforward_modules == ["mlp.down_proj"]
    shapes = {
        n.rpartition(".")[2]: tuple(a.adapters["default"].ia3_l.shape) for n, a in adapted(model.get_base_model())
    }
    assert shapes == {"q_proj": (16, 1), "down_proj": (1, 24)}


def test_tied_weights_are_counted_once() -> None:
    model = get_peft_model(llama(tie_word_embeddings=True), lora())
    trainable, total = model.get_nb_trainable_parameters()
    assert total - trainable == sum(p.numel() for p in llama(tie_word_embeddings=True).parameters())
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * 32 + 2 * 24)
    assert torch.is_tensor(next(model.parameters()))

"""Adapters swapped and rescaled in use: the same answers as freshly loaded ones, and nothing compiled again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_llama import IDS, llama, logits, move
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import MixtralConfig, MixtralForCausalLM

from trimtab import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    rescale_adapter_scale,
)
from trimtab.core.config import config_for
from trimtab.errors import ConfigError, NoMatch, NotMergeable, TrimtabWarning


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def saved(folder: Path, seed: int, config: Any = None, **fields: Any) -> Path:
    """An adapter folder, and beside it what it answers."""
    config = config or LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | fields)
    model = get_peft_model(llama(), config)
    move(model, seed)
    place = folder / str(seed)
    model.save_pretrained(place)
    torch.save(logits(model.eval()), folder / f"{seed}.pt")
    return place


def answer(place: Path) -> torch.Tensor:
    return torch.load(f"{place}.pt")


def near(model: nn.Module, place: Path, bound: float = 1e-6) -> None:
    assert (logits(model) - answer(place)).abs().max() < bound


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraConfig(r=4, target_modules=["v_proj", "o_proj"]),
        lambda: LoraConfig(r=4, target_modules=["v_proj", "o_proj"], use_dora=True),
        lambda: OFTConfig(oft_block_size=4, target_modules=["v_proj", "o_proj"]),
        lambda: IA3Config(target_modules=["v_proj", "o_proj"], feedforward_modules=[]),
    ],
    ids=["lora", "dora", "oft", "ia3"],
)
def test_a_swapped_adapter_answers_as_a_loaded_one(make: Any, tmp_path: Path) -> None:
    first, second = (saved(tmp_path, seed, make()) for seed in (1, 2))
    model = PeftModel.from_pretrained(llama(), first)
    hotswap_adapter(model, second, "default")
    assert torch.equal(logits(model), answer(second))
    hotswap_adapter(model, first, "default")
    assert torch.equal(logits(model), answer(first))
    assert (answer(first) - answer(second)).abs().max() > 1e-4


def test_other_ranks_scales_and_layers_without_compiling_again(tmp_path: Path) -> None:
    places = [
        saved(tmp_path, 1, r=4, lora_alpha=8),
        saved(tmp_path, 2, r=2, lora_alpha=16),
        saved(tmp_path, 3, r=6, lora_alpha=3, use_rslora=True),
        saved(tmp_path, 4, r=3, lora_alpha=3, rank_pattern={"q_proj": 5}, alpha_pattern={"layers.0.self_attn.v_proj": 9}),
        saved(tmp_path, 5, r=4, target_modules=["q_proj"]),
    ]
    model = PeftModel.from_pretrained(llama(), places[0])
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    near(model, places[0])
    assert model.peft_config["default"].r == 6
    counter = CompileCounter()
    compiled: Any = torch.compile(model.get_base_model(), backend=counter)
    with torch.no_grad():
        compiled(input_ids=IDS)
        count = counter.frame_count
        assert count > 0
        for place in [*places[1:], places[0]]:
            hotswap_adapter(model, place, "default")
            assert (compiled(input_ids=IDS).logits - answer(place)).abs().max() < 1e-6
            model.save_pretrained(tmp_path / "again")  # with its zeros it still says what it does
            near(PeftModel.from_pretrained(llama(), tmp_path / "again"), place)
    assert counter.frame_count == count
    status = model.get_model_status()
    assert status.active_adapters == ["default"] and status.enabled is True and status.merged_adapters == []
    assert status.trainable_params == 0 and status.available_adapters == ["default"]


def test_without_preparation_ranks_must_have_room(tmp_path: Path) -> None:
    small, large = saved(tmp_path, 1, r=2), saved(tmp_path, 2, r=3, lora_alpha=5)
    model = PeftModel.from_pretrained(llama(), large)
    hotswap_adapter(model, small, "default")
    near(model, small)
    other = PeftModel.from_pretrained(llama(), small)
    with pytest.raises(ConfigError, match="target_rank=3"):
        hotswap_adapter(other, large, "default")
    assert torch.equal(logits(other), answer(small))


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"use_dora": True}, ConfigError, "use_dora False here, True there"),
        ({"lora_dropout": 0.1}, ConfigError, "lora_dropout"),
        ({"target_modules": ["q_proj", "k_proj"]}, ValueError, "unexpected"),
    ],
    ids=["dora", "dropout", "more-layers"],
)
def test_what_does_not_fit_changes_nothing(fields: dict[str, Any], error: type, match: str, tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1), saved(tmp_path, 2, **fields)
    model = PeftModel.from_pretrained(llama(), first)
    with pytest.raises(error, match=match):
        hotswap_adapter(model, second, "default")
    assert torch.equal(logits(model), answer(first))


def test_a_merged_adapter_is_not_swapped(tmp_path: Path) -> None:
    place = saved(tmp_path, 1)
    model = PeftModel.from_pretrained(llama(), place)
    model.merge_adapter()
    with pytest.raises(NotMergeable, match="merged"):
        hotswap_adapter(model, place, "default")
    with pytest.raises(NotMergeable, match="merged"), rescale_adapter_scale(model, 0.5):
        pass


def test_preparing_too_late_or_for_too_little(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(llama(), saved(tmp_path, 1))
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(TrimtabWarning, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    with pytest.raises(ConfigError, match="it has rank 8"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    with pytest.raises(NoMatch, match="no LoRA"):
        prepare_model_for_compiled_hotswap(llama())
    given = LoraConfig(r=2, rank_pattern={"q_proj": 3})
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=given)
    assert given.r == 8 and given.rank_pattern == {"q_proj": 8}


@pytest.mark.filterwarnings("ignore:adapter 'default' mixes the groups")
def test_groups_of_a_convolution_and_embeddings_keep_their_rows(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 6), nn.Conv1d(6, 4, 2, groups=2))

    x = torch.arange(6)
    places = []
    for seed, r in ((1, 4), (2, 2)):
        model = get_peft_model(made(), LoraConfig(r=r, target_modules=["0", "1"]))
        move(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        with torch.no_grad():
            y = model.get_base_model()[1](model.get_base_model()[0](x).T)
        places.append((tmp_path / str(seed), y))
    model = PeftModel.from_pretrained(made(), places[0][0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for place, want in reversed(places):
        hotswap_adapter(model, place, "default")
        with torch.no_grad():
            got = model.get_base_model()[1](model.get_base_model()[0](x).T)
        assert (got - want).abs().max() < 1e-6
    with pytest.raises(ConfigError, match="2 groups do not divide"):
        prepare_model_for_compiled_hotswap(model, target_rank=9)


# -- scale ------------------------------------------------------------------------------------------------------------
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rescaled_adapter_does_that_much_of_what_it_does(name: str) -> None:
    model: PeftModelForCausalLM = get_peft_model(llama(), CONFIGS[name]())  # type: ignore[assignment]
    move(model)
    before, keys, published = logits(model.eval()), set(model.state_dict()), set(get_peft_model_state_dict(model))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    w = layer.port.weight()
    d = layer.adapters["default"].weight(w) - w
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    with rescale_adapter_scale(model, 0.25):
        assert (layer(x) - x @ (w + 0.25 * d).T).abs().max() < 1e-5
        with rescale_adapter_scale(model, 2):
            assert (layer(x) - x @ (w + 0.5 * d).T).abs().max() < 1e-5
            half = logits(model)
            model.merge_adapter()
            assert (logits(model) - half).abs().max() < 1e-5
            model.unmerge_adapter()
        assert set(get_peft_model_state_dict(model)) == published
        state = model.get_layer_status()[0]
        assert state.active_adapters == ["default"] and state.enabled and state.available_adapters == ["default"]
    assert torch.equal(logits(model), before) and set(model.state_dict()) == keys
    with rescale_adapter_scale(model, 0.0):
        if name != "lora":  # the head that it trained whole is no matter of scale
            assert (logits(model) - logits(llama())).abs().max() < 1e-6
    with pytest.raises(ZeroDivisionError), rescale_adapter_scale(model, 3.0):
        _ = 1 / 0
    assert torch.equal(logits(model), before)


BLOCKS = {
    "bottleneck": {"non_linearity": "tanh", "reduction_factor": 4},
    "loreft": {"r": 2},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 2},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_stands_around_a_block_is_rescaled_and_calls_it_once(name: str) -> None:
    model: PeftModelForCausalLM = get_peft_model(llama(), config_for(name, **BLOCKS[name]))  # type: ignore[assignment]
    move(model)
    before = logits(model.eval())
    with rescale_adapter_scale(model, 1.0):
        assert (logits(model) - before).abs().max() < 1e-6
        cached, whole = (
            model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=cache, eos_token_id=None)
            for cache in (True, False)
        )
        assert torch.equal(cached, whole)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model), logits(llama()))
    with rescale_adapter_scale(model, 0.5):
        assert all((logits(model) - other).abs().max() > 1e-4 for other in (before, logits(llama())))


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=37, hidden_size=16, intermediate_size=8, num_hidden_layers=1)
    return MixtralForCausalLM(
        MixtralConfig(num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, **sizes)
    ).eval()


def on_experts(seed: int, **fields: Any) -> PeftModel:
    slabs = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    model = get_peft_model(mixtral(), LoraConfig(**slabs | {"r": 4, "lora_alpha": 8} | fields))  # type: ignore[arg-type]
    move(model, seed)
    return model.eval()


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = torch.sin(input_ids[..., None] * torch.arange(1, 17))
        return SimpleNamespace(logits=self.inner(x, x, x)[0])


@pytest.mark.parametrize("kind", ["experts", "attention"])
def test_weights_inside_a_layer_are_rescaled_not_its_answer(kind: str) -> None:
    model = on_experts(1) if kind == "experts" else get_peft_model(Attends(), LoraConfig(r=2, target_modules=["inner"])).eval()
    move(model)
    before = logits(model)
    with rescale_adapter_scale(model, 2.0), rescale_adapter_scale(model, 0.25):
        half = logits(model)
        model.merge_adapter()
        assert (logits(model) - half).abs().max() < 1e-5
        model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    for name, p in model.named_parameters():
        p.data *= 0.5 if "lora_B" in name else 1
    assert (logits(model) - half).abs().max() < 1e-5 and (half - before).abs().max() > 1e-4


@pytest.mark.parametrize("prepared", [False, True])
def test_experts_are_swapped_with_their_ranks_and_scales(prepared: bool, tmp_path: Path) -> None:
    model = on_experts(1)
    other = on_experts(2, r=2, lora_alpha=6, rank_pattern={"experts.down_proj": 3}, alpha_pattern={"gate_up_proj": 5})
    other.save_pretrained(tmp_path / "other")
    if prepared:
        before = logits(model)
        prepare_model_for_compiled_hotswap(model, target_rank=5)
        assert (logits(model) - before).abs().max() < 1e-6
    hotswap_adapter(model, tmp_path / "other", "default")
    assert (logits(model) - logits(other)).abs().max() < 1e-6
    model.save_pretrained(tmp_path / "swapped")
    again = PeftModel.from_pretrained(mixtral(), tmp_path / "swapped")
    assert (logits(again) - logits(other)).abs().max() < 1e-6
    on_experts(3, r=6).save_pretrained(tmp_path / "larger")
    with pytest.raises(ConfigError, match="has room for rank"):
        hotswap_adapter(model, tmp_path / "larger", "default")


def test_what_cannot_be_rescaled() -> None:
    with pytest.raises(NoMatch, match="no adapter"), rescale_adapter_scale(llama(), 0.5):
        pass
    with pytest.raises(TypeError, match="a number"), rescale_adapter_scale(llama(), "0.5"):  # type: ignore[arg-type]
        pass

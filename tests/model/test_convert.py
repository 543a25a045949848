"""Adapters as LoRAs and combined: in folders and in memory, on a model of several layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_llama import llama, logits, move

import trimtab
from trimtab import IA3Config, LoraConfig, OFTConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from trimtab.errors import ConfigError, NotSupported

DORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True}


def adapted(config: Any, seed: int = 3) -> PeftModel:
    model = get_peft_model(llama(), config)
    move(model, seed)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**DORA, modules_to_save=["lm_head"]),
        OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
        IA3Config(target_modules=["q_proj", "k_proj"], feedforward_modules=[]),
    ],
    ids=["dora", "oft", "ia3"],
)
def test_at_full_energy_the_lora_answers_as_the_adapter(config: Any, tmp_path: Path) -> None:
    model = adapted(config)
    fit = save_as_lora(tmp_path, model, 1.0)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5 < (logits(llama()) - logits(model)).abs().max()
    assert fit.error < 1e-6 and len(fit.errors) == 4
    said = json.loads((tmp_path / "lora_conversion.json").read_text())
    assert said["rank"] == 1.0 and said["error"] == fit.error and said["ranks"] == fit.ranks
    assert len(model.peft_config) == 1  # the adapter stays as it was


def test_a_lower_rank_is_told_by_its_error() -> None:
    model = adapted(OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]))
    errors = []
    for rank in (1, 4, 12, 16):
        config, tensors = made = convert_to_lora(model, rank)
        assert (config.r, config.lora_alpha, config.rank_pattern) == (rank, rank, {})
        assert sorted(config.target_modules or []) == ["down_proj", "q_proj"]
        assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (rank, 16)
        errors.append(made.fit.error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[-1] < 1e-6


def test_a_share_of_the_energy_gives_each_layer_its_rank() -> None:
    model = adapted(OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]))
    made = convert_to_lora(model, 0.8)
    config, tensors = made
    assert len({*made.fit.ranks.values()}) > 1 and config.rank_pattern == config.alpha_pattern != {}
    for path, error in made.fit.errors.items():
        assert error <= 0.2**0.5 + 1e-6
        assert tensors[f"base_model.model.{path}.lora_A.weight"].shape[0] == made.fit.ranks[path]


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True])
def test_ranks_that_mean_nothing_are_refused(rank: Any) -> None:
    with pytest.raises(ConfigError, match="rank"):
        convert_to_lora(adapted(LoraConfig(**DORA)), rank)


def test_what_changes_no_weight_is_refused() -> None:
    model = get_peft_model(llama(), trimtab.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))  # type: ignore[attr-defined]
    with pytest.raises(NotSupported, match="changes no weight"):
        convert_to_lora(model, 2)


def two(**more: Any) -> PeftModel:
    model = adapted(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], **more))
    model.add_adapter("other", LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "v_proj"], **more))
    model.set_adapter("other")
    move(model, 4)
    model.set_adapter("default")
    return model


def delta(model: PeftModel, name: str, path: str = "model.layers.0.self_attn.q_proj") -> Any:
    layer = model.get_base_model().get_submodule(path)
    w = layer.port.weight()  # type: ignore[union-attr]
    return (layer.adapters[name].weight(w) - w).detach()  # type: ignore[union-attr,index]


def test_a_combination_is_saved_and_loaded_and_trains_like_any_lora(tmp_path: Path) -> None:
    model = two(modules_to_save=["lm_head"])
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "cat")
    want = 0.5 * delta(model, "default") - 2 * delta(model, "other")
    assert (delta(model, "sum") - want).abs().max() < 1e-6
    head = model.get_base_model().lm_head
    mine = {k: head.adapters[k].copy.weight for k in ("default", "other", "sum")}
    start = head.base_layer.weight
    assert (mine["sum"] - (start + 0.5 * (mine["default"] - start) - 2 * (mine["other"] - start))).abs().max() < 1e-6
    model.set_adapter("sum")
    y = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    config = PeftModel.from_pretrained(llama(), tmp_path / "sum").peft_config["default"]
    assert config.rank_pattern == {f"model.layers.{i}.self_attn.v_proj": 3 for i in (0, 1)} and config.r == 5
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "sum")), y)
    assert any(p.requires_grad for p in model.parameters())
    assert model.get_model_status().available_adapters == ["default", "other", "sum"]
    assert {s.name: s.requires_grad for s in model.get_layer_status()}["model.layers.0.self_attn.v_proj"] == {
        "other": False, "sum": True
    }  # fmt: skip


def test_ties_by_hand() -> None:
    """Pruned to the largest half, the sign with the larger sum elected, the mean of those that have it."""
    model = two()
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "ties", "ties_svd", density=0.5, svd_rank=16)
    kept = []
    for name in ("default", "other"):
        d = delta(model, name)
        kept.append(torch.where(d.abs() >= d.abs().flatten().sort(descending=True).values[d.numel() // 2 - 1], d, 0))
    want = torch.zeros_like(kept[0])
    for i in range(16):
        for j in range(16):
            a, b = kept[0][i, j].item(), kept[1][i, j].item()
            sign = 1 if a + b >= 0 else -1
            voters = [w * v for w, v in ((1.0, a), (0.5, b)) if v * sign > 0]
            want[i, j] = sum(voters) / max(1, len(voters))
    assert (delta(model, "ties") - want).abs().max() < 1e-6 and want.abs().max() > 0.1


def test_a_negative_weight_is_elected_by_what_it_adds() -> None:
    model = two()
    for kind in ("ties_svd", "dare_ties_svd", "magnitude_prune_svd", "dare_linear_svd", "svd", "ties", "dare_ties",
                 "magnitude_prune", "dare_linear"):  # fmt: skip
        model.add_weighted_adapter(["other"], [-1.0], kind, kind, density=1.0)
        assert (delta(model, kind) + delta(model, "other")).abs().max() < 5e-6, kind


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"combination_type": "tyes"}, "combination_type"),
        ({"combination_type": "ties"}, "needs density"),
        ({"combination_type": "ties", "density": 1.5}, "density"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"adapters": ["default", "othr"]}, "othr"),
        ({"adapters": ["other", "other"]}, "each of them once"),
        ({"adapter_name": "other"}, "called 'other' already"),
        ({"svd_rank": 0}, "rank"),
    ],
    ids=str,
)
def test_mistakes_are_told_and_change_nothing(given: dict[str, Any], match: str) -> None:
    model = two()
    fields = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "new"} | given
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(**fields)
    assert list(model.peft_config) == ["default", "other"]


def test_svd_clamp_cuts_off_what_lies_beyond_the_quantile() -> None:
    model = two()
    model.add_weighted_adapter(["default"], [1.0], "clamped", svd_clamp=0.9)
    lora = model.get_base_model().model.layers[0].self_attn.q_proj.adapters["clamped"]
    most = torch.cat([lora.lora_A.weight.flatten(), lora.lora_B.weight.flatten()]).abs().max()
    model.add_weighted_adapter(["default"], [1.0], "free")
    free = model.get_base_model().model.layers[0].self_attn.q_proj.adapters["free"]
    values = torch.cat([free.lora_B.weight.flatten(), free.lora_A.weight.flatten()])
    assert abs(most - torch.quantile(values, 0.9)) < 1e-6


def test_an_injected_model_gives_keys_without_prefix(tmp_path: Path) -> None:
    model = trimtab.inject_adapter_in_model(LoraConfig(**DORA), llama())
    move(model)
    _, tensors = convert_to_lora(model, 2)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    save_as_lora(tmp_path, model, 2)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(tensors)

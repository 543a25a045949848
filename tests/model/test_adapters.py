"""Several adapters on one model: switching, ordering, deleting, saving under any name, merging away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_llama import IDS, llama, logits, move, same, state

import trimtab
from trimtab import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from trimtab.errors import ConfigError, NoMatch, NotMergeable, TrimtabWarning


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]} | more)


def three() -> PeftModel:
    """Three adapters of three methods, each moved off its start."""
    model = get_peft_model(llama(), lora())
    move(model)
    for seed, (name, config) in enumerate(
        {
            "rotation": OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
            "scale": IA3Config(target_modules=["q_proj", "k_proj"], feedforward_modules=[]),
        }.items()
    ):
        model.add_adapter(name, config)
        model.set_adapter(name)
        move(model, seed)
    model.set_adapter("default")
    return model.eval()


def trained(model: PeftModel) -> set[str]:
    found = {
        n
        for n, g in model.get_base_model().trimtab_groups.items()
        if any(p.requires_grad for part in g.parts() for p in part.parameters())
    }
    return found


def test_set_adapter_takes_a_name_or_a_list_and_trains_what_is_active() -> None:
    model = three()
    assert model.active_adapters == ["default"] and model.active_adapter == "default" and trained(model) == {"default"}
    alone = logits(model)
    model.set_adapter(["rotation", "default"])
    assert model.active_adapters == ["rotation", "default"] and trained(model) == {"default", "rotation"}
    one = logits(model)
    model.set_adapter(["default", "rotation"])
    assert model.active_adapters == ["default", "rotation"]
    assert (logits(model) - one).abs().max() > 1e-5  # order matters for a rotation
    model.set_adapter("default", inference_mode=True)
    assert trained(model) == set() and torch.equal(logits(model), alone)
    model.set_requires_grad(["scale"])
    assert trained(model) == {"scale"}
    with pytest.raises(NoMatch, match="Did you mean 'rotation'"):
        model.set_adapter(["default", "rotatoin"])
    assert model.active_adapters == ["default"] and torch.equal(logits(model), alone)


def test_an_adapter_that_is_added_takes_the_mode_of_its_model() -> None:
    model = get_peft_model(llama(), lora()).eval()
    model.add_adapter("other", lora(lora_dropout=0.9, init_lora_weights=False))
    model.set_adapter("other")
    assert torch.equal(model(IDS).logits, model(IDS).logits)  # nothing is dropped
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)


def test_delete_adapter_restores_layers_and_names_the_next_one() -> None:
    model = three()
    alone = logits(model)
    model.delete_adapter("scale")
    assert torch.equal(logits(model), alone) and sorted(model.peft_config) == ["default", "rotation"]
    assert type(model.get_base_model().model.layers[0].self_attn.k_proj) is torch.nn.Linear  # it stood there alone
    with pytest.warns(TrimtabWarning, match="'rotation' is now"):
        model.delete_adapter("default")
    assert model.active_adapters == ["rotation"]
    model.merge_adapter()
    with pytest.raises(NotMergeable, match="unmerge_adapter"):
        model.delete_adapter("rotation")
    model.unmerge_adapter()
    model.delete_adapter("rotation")
    base = model.get_base_model()
    assert same(state(base), state(llama())) and not any("adapters" in n for n, _ in base.named_modules())
    with pytest.raises(NoMatch):
        model.delete_adapter("rotation")


@pytest.mark.parametrize(
    "name", ["0", "layers", "keys", "train", "weight", "lora_A", "base_layer", "forward", "model", "default_2"]
)
def test_no_name_collides_with_a_module_s(name: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    move(model)
    model.add_adapter(name, lora(r=3))
    model.set_adapter(name)
    move(model, 8)
    both = {n: [] for n in ("default", name)}
    for n in both:
        model.set_adapter(n)
        both[n] = [logits(model)]
    model.save_pretrained(tmp_path)
    first, second = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / name))
    assert len(first) == len(second) == 8 and first.keys() == second.keys()
    assert {v.shape[0] for k, v in second.items() if "lora_A" in k} == {3}
    again = PeftModel.from_pretrained(llama(), tmp_path)
    again.load_adapter(tmp_path, name, subfolder=name)
    for n, (want,) in both.items():
        again.set_adapter(n)
        assert torch.equal(logits(again), want)
    model.train().eval()
    model.set_adapter("default")
    model.delete_adapter(name)
    assert torch.equal(logits(model), both["default"][0])


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a\\b"])
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    model = get_peft_model(llama(), lora())
    with pytest.raises(ConfigError, match="no dot and no slash"):
        model.add_adapter(name, lora())
    with pytest.raises(ConfigError, match="already"):
        model.add_adapter("default", lora())
    assert list(model.peft_config) == ["default"]


def test_wrapping_twice_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    model.save_pretrained(tmp_path)
    for again in (model, model.base_model, model.get_base_model()):
        with pytest.raises(ConfigError, match="carries adapters already"):
            get_peft_model(again, lora())
        with pytest.raises(ConfigError, match="carries adapters already"):
            PeftModel.from_pretrained(again, tmp_path)


def test_merge_and_unload_gives_the_plain_model_and_spends_the_handle() -> None:
    model = three()
    model.set_adapter(["default", "rotation", "scale"])
    want = logits(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(llama()) and plain.state_dict().keys() == llama().state_dict().keys()
    assert (logits(plain) - want).abs().max() < 1e-5
    for call in (
        lambda: model(input_ids=IDS),
        lambda: model.generate(input_ids=IDS),
        lambda: model.save_pretrained("x"),
    ):
        with pytest.raises(NoMatch, match="no adapter any more"):
            call()
    again = get_peft_model(plain, lora())  # the plain model is good for the next adapter
    assert (logits(again) - want).abs().max() < 1e-5


def test_merging_a_tied_head_unties_the_config(tmp_path: Path) -> None:
    model = get_peft_model(llama(tie_word_embeddings=True), lora(target_modules=["embed_tokens", "q_proj"]))
    move(model)
    want = logits(model)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False and plain.lm_head.weight is not plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert (logits(again) - want).abs().max() < 1e-5
    still = get_peft_model(llama(tie_word_embeddings=True), lora())
    assert still.merge_and_unload().config.tie_word_embeddings is True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_is_kept_while_merged_goes_along(dtype: torch.dtype) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    move(model)
    model.merge_adapter("default")
    model.to(dtype)
    merged = logits(model)
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert (logits(model) - merged).abs().max() < 1e-2


def test_unload_while_merged_says_which_model_is_meant() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"default: merged, .* unmerge_adapter\(\) first; or merge_and_unload\(\)"):
        model.unload()
    with pytest.raises(ConfigError, match="finite"):
        model.add_weighted_adapter(["default"], [float("nan")], "sum")
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_merge_of_some_and_twice_and_what_is_not_active() -> None:
    model = three()
    model.set_adapter(["default", "rotation"])
    want = logits(model)
    model.merge_adapter(["default"])
    assert (logits(model) - want).abs().max() < 1e-5
    with pytest.warns(TrimtabWarning, match="merged already: default"):
        model.merge_adapter()
    assert (logits(model) - want).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    with pytest.raises(NoMatch, match="not active"):
        model.merge_adapter(["scale"])
    with model.disable_adapter(), pytest.raises(NotMergeable, match="disabled"):
        model.merge_adapter()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.inf)
    with pytest.raises(NotMergeable, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert not any(s.merged_adapters for s in model.get_layer_status())


def test_status_of_layers_and_model() -> None:
    model = three()
    layers = {s.name: s for s in model.get_layer_status()}
    assert len(layers) == 8  # 2 x (q, v, k, down)
    q, k = layers["model.layers.0.self_attn.q_proj"], layers["model.layers.0.self_attn.k_proj"]
    assert q.available_adapters == ["default", "rotation", "scale"] and q.active_adapters == ["default"]
    assert q.requires_grad == {"default": True, "rotation": False, "scale": False} and q.module_type == "Linear"
    assert (
        k.available_adapters == ["scale"] and k.active_adapters == [] and q.enabled and q.quantization_backend is None
    )
    assert q.devices == {"default": ["cpu"], "rotation": ["cpu"], "scale": ["cpu"]}
    whole = trimtab.get_model_status(model)
    assert whole.peft_types == {"default": "LORA", "rotation": "OFT", "scale": "IA3"}
    assert whole.base_model_type == "LlamaForCausalLM" and whole.adapter_model_type == "PeftModelForCausalLM"
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    assert whole.trainable_params == 2 * (2 * (16 + 16) + 2 * (16 + 8)) and whole.num_adapter_layers == 8
    assert whole.active_adapters == ["default"] and whole.merged_adapters == [] and whole.enabled is True
    model.get_base_model().model.layers[0].self_attn.q_proj.adapters["default"].requires_grad_(False)
    assert model.get_model_status().requires_grad["default"] == "irregular"
    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_modules_to_save_are_trained_saved_and_switched(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    move(model)
    base, want = logits(llama()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), want)
    plain = model.merge_and_unload()
    assert (logits(plain) - want).abs().max() < 1e-5 and type(plain.lm_head) is torch.nn.Linear


def test_the_same_seed_gives_the_same_start_whatever_ran_before() -> None:
    made = []
    for noise in (0, 17):
        base = llama()
        torch.manual_seed(5)
        torch.rand(noise)
        order = ["q_proj", "v_proj"] if noise else ["v_proj", "q_proj"]
        made.append(get_peft_model(base, lora(target_modules=order, init_lora_weights=False)))
    assert same(*(trimtab.get_peft_model_state_dict(m) for m in made))
    torch.manual_seed(6)
    other = trimtab.get_peft_model_state_dict(get_peft_model(llama(), lora()))
    torch.manual_seed(5)
    wide = trimtab.get_peft_model_state_dict(
        get_peft_model(llama(), lora(target_modules="all-linear", init_lora_weights=False))
    )
    first = trimtab.get_peft_model_state_dict(made[0])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(other[key], first[key])
    assert torch.equal(wide[key], first[key]) or torch.initial_seed() != 5  # other targets, same start here


def test_inject_and_state_dicts() -> None:
    model = trimtab.inject_adapter_in_model(lora(), llama())
    assert type(model) is type(llama())
    move(model)
    tensors = trimtab.get_peft_model_state_dict(model)
    assert len(tensors) == 8 and all(k.startswith("model.layers.") and "default" not in k for k in tensors)
    again = trimtab.inject_adapter_in_model(lora(), llama(), state_dict=tensors)
    assert torch.equal(logits(again), logits(model))
    wrapped = get_peft_model(llama(), lora())
    report = trimtab.set_peft_model_state_dict(wrapped, tensors)
    assert len(report.loaded) == 8 and not report.problems() and torch.equal(logits(wrapped), logits(model))
    assert same(
        {k.removeprefix("base_model.model."): v for k, v in trimtab.get_peft_model_state_dict(wrapped).items()}, tensors
    )


def test_the_model_stands_where_the_base_stood() -> None:
    from transformers import PreTrainedModel

    model = get_peft_model(llama(), lora())
    assert isinstance(model, PreTrainedModel) and type(model) is trimtab.PeftModelForCausalLM
    assert isinstance(model, PeftModel) and model.config is model.get_base_model().config
    assert model.base_model.model is model.get_base_model() and model.device == torch.device("cpu")
    move(model)
    text = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert text.shape == (2, 8) and torch.equal(text[:, :5], IDS)
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_everything_public_is_there_and_sorted() -> None:
    assert trimtab.__all__ == sorted(trimtab.__all__) and len(set(trimtab.__all__)) == len(trimtab.__all__)
    assert all(getattr(trimtab, name) is not None for name in trimtab.__all__)
    import types

    public = {n for n, v in vars(trimtab).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    public = {n for n in public if not n.endswith("Config")}  # each method's is there
    assert public - {"TYPE_CHECKING", "Any", "annotations", "Iterator", "ModuleType"} <= set(trimtab.__all__)

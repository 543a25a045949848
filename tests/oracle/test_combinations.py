"""Combined and converted adapters against peft: the same where it is right, and side by side where it is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import base, close, configs, logits, move, quiet_peft
from torch import Tensor, nn

import trimtab

SITE = "model.layers.0.self_attn.q_proj"
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def both(**more: Any) -> tuple[Any, Any]:
    """Two LoRAs, `a` and `b`, on our model and on peft's, with the same tensors."""
    ours_config, theirs_config = configs("lora", "llama", **FIELDS | more)
    theirs = quiet_peft(base("llama"), theirs_config)
    theirs.add_adapter("b", theirs_config)
    ours = trimtab.get_peft_model(base("llama"), ours_config)
    ours.add_adapter("b", ours_config)
    for seed, name in enumerate(("default", "b")):
        tensors = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        draw = torch.Generator().manual_seed(seed)
        tensors = {k: 0.3 * torch.randn(v.shape, generator=draw) for k, v in sorted(tensors.items())}
        peft.set_peft_model_state_dict(theirs, tensors, adapter_name=name)
        trimtab.set_peft_model_state_dict(ours, tensors, name)
    return ours, theirs


def our_delta(model: Any, name: str) -> Tensor:
    layer = model.get_base_model().get_submodule(SITE)
    w = layer.port.weight()
    return (layer.adapters[name].weight(w) - w).detach()


def their_delta(model: Any, name: str) -> Tensor:
    return model.get_base_model().get_submodule(SITE).get_delta_weight(name).detach()


def add(model: Any, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (model if hasattr(type(model), "add_weighted_adapter") else model.base_model).add_weighted_adapter(*args, **kwargs)


def test_cat_is_theirs() -> None:
    ours, theirs = both()
    for model in (ours, theirs):
        add(model, ["default", "b"], [0.7, -1.3], "c", "cat")
    close(our_delta(ours, "c"), their_delta(theirs, "c"))
    close(our_delta(ours, "c"), 0.7 * our_delta(ours, "default") - 1.3 * our_delta(ours, "b"))


def test_linear_is_the_sum_here_and_not_there() -> None:
    ours, theirs = both()
    for model in (ours, theirs):
        add(model, ["default", "b"], [0.7, 1.3], "c", "linear")
    want = 0.7 * our_delta(ours, "default") + 1.3 * our_delta(ours, "b")
    close(our_delta(ours, "c"), want)
    assert (their_delta(theirs, "c") - want).abs().max() > 0.3 * want.abs().max()


@pytest.mark.parametrize(
    ("kind", "more"),
    [("svd", {}), ("ties_svd", {"density": 0.5}), ("magnitude_prune_svd", {"density": 0.3}),
     ("ties_svd", {"density": 0.4, "majority_sign_method": "frequency"})],
    ids=str,
)  # fmt: skip
def test_what_is_cut_from_deltas_is_theirs(kind: str, more: dict[str, Any]) -> None:
    ours, theirs = both()
    for model in (ours, theirs):
        add(model, ["default", "b"], [0.7, 1.3], "c", kind, svd_rank=5, **more)
    close(our_delta(ours, "c"), their_delta(theirs, "c"))


def test_rslora_is_not_scaled_twice() -> None:
    ours, theirs = both(use_rslora=True)
    for model in (ours, theirs):
        add(model, ["default", "b"], [1.0, 1.0], "c", "svd", svd_rank=8)
    want = our_delta(ours, "default") + our_delta(ours, "b")
    close(our_delta(ours, "c"), want, 1e-5)
    close(their_delta(theirs, "c"), 8**0.5 * want, 1e-4)


def test_different_ranks_are_refused_there_and_added_here() -> None:
    ours, theirs = both()
    for model, kind in ((ours, trimtab.LoraConfig), (theirs, peft.LoraConfig)):
        model.add_adapter("wide", kind(**FIELDS | {"r": 6}))
    with pytest.raises(ValueError, match="same r value"):
        add(theirs, ["default", "wide"], [1.0, 1.0], "c", "linear")
    add(ours, ["default", "wide"], [1.0, 1.0], "c", "linear")
    close(our_delta(ours, "c"), our_delta(ours, "default") + our_delta(ours, "wide"))


@pytest.mark.parametrize("method", ["dora", "oft", "vera", "hira", "boft"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_peft_loads_what_is_saved_as_lora(method: str, model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"] if model == "llama" else ["c_attn"]}
    ours = trimtab.get_peft_model(base(model), configs(method, model, **options)[0])
    move(ours)
    fit = trimtab.save_as_lora(tmp_path, ours, 1.0)
    assert fit.error < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(base(model), str(tmp_path))
    want = logits(ours, model)
    close(logits(back, model), want, 2e-5 * max(1.0, want.abs().max().item()))


def test_a_dora_keeps_its_lengths_here_and_loses_them_there() -> None:
    ours_config, theirs_config = configs("dora", "llama", target_modules=["q_proj"])
    theirs = quiet_peft(base("llama"), theirs_config)
    move(theirs, 0.3)
    tensors = peft.get_peft_model_state_dict(theirs)
    ours = trimtab.get_peft_model(base("llama"), ours_config)
    trimtab.set_peft_model_state_dict(ours, tensors)
    want = our_delta(ours, "default")

    def product(tensors: dict[str, Tensor]) -> Tensor:
        key = f"base_model.model.{SITE}.lora_{{}}.weight"
        return tensors[key.format("B")] @ tensors[key.format("A")]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lost = product(peft.convert_to_lora(theirs, 32)[1])
    close(product(trimtab.convert_to_lora(ours, 32)[1]), want)
    assert (lost - want).abs().max() > 0.1 * want.abs().max()


def test_lora_on_a_convolution_travels_both_ways(tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=2))

    x, fields = torch.randn(2, 4, 5, 5), {"r": 4, "target_modules": ["0", "1"]}
    theirs = quiet_peft(made(), peft.LoraConfig(**fields))  # type: ignore[arg-type]
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    close(trimtab.PeftModel.from_pretrained(made(), tmp_path / "theirs")(x), theirs(x))
    ours = trimtab.get_peft_model(made(), trimtab.LoraConfig(**fields))  # type: ignore[arg-type]
    move(ours)
    ours.save_pretrained(tmp_path / "ours")
    close(peft.PeftModel.from_pretrained(made(), str(tmp_path / "ours"))(x), ours(x))


@pytest.mark.parametrize("method", ["lora", "boft", "dora", "deft", "glora", "hira", "peanut"])
def test_two_active_adapters_act_one_on_the_other_here_and_side_by_side_there(method: str, tmp_path: Path) -> None:
    """Which is the same where a change does not depend on the weight, and with rotations, which compose in both."""
    options = {"target_modules": ["q_proj"]}
    ours = trimtab.get_peft_model(base("llama"), configs(method, "llama", **options)[0])
    ours.add_adapter("b", configs(method, "llama", **options)[0])
    for seed, name in enumerate(("default", "b")):
        ours.set_adapter(name)
        move(ours, 0.3 + 0.1 * seed)
    ours.save_pretrained(tmp_path)
    ours.set_adapter(["default", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path))
        theirs.load_adapter(str(tmp_path / "b"), "b")
    theirs.base_model.set_adapter(["default", "b"])
    layer, other = (model.get_base_model().get_submodule(SITE) for model in (ours, theirs))
    x = torch.randn(3, layer.port.shape[1], generator=torch.Generator().manual_seed(1))
    w, b = layer.port.weight(), layer.port.bias()
    first, second = (layer.adapters[name] for name in ("default", "b"))
    close(layer(x), torch.nn.functional.linear(x, second.weight(first.weight(w)), b), 2e-5)
    if method in ("lora", "boft"):
        close(other(x), layer(x), 2e-5)
    else:
        side_by_side = first.weight(w) + second.weight(w) - w
        if method == "dora":  # the second goes on from the first, but divides by the length that it gives the frozen weight
            moved = second.lora.weight(w)
            side_by_side = (first.weight(w) + moved - w) * (second.m / moved.norm(dim=1))[:, None]
        close(other(x), torch.nn.functional.linear(x, side_by_side, b), 2e-5)
        assert (side_by_side - second.weight(first.weight(w))).abs().max() > 1e-3

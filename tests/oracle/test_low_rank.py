"""The methods with low-rank and structured updates, on models and on single layers: peft's adapters in our hands and ours
in peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from theirs import close, configs, exchange, quiet_peft
from torch import Tensor, nn

import trimtab
from trimtab.methods.peanut import _ACTIVATIONS

show = lambda v: "-".join(f"{k}={x}" for k, x in v.items()) or "plain" if isinstance(v, dict) else str(v)  # noqa: E731


class Host(nn.Module):
    """A model that is one layer, and something frozen beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (2, 3, 12)),
    "wide": (lambda: nn.Linear(8, 20, bias=False), (3, 8)),
    "embedding": (lambda: nn.Embedding(11, 8), ()),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, dilation=2), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 8, 7)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 8, 1, bias=False), (2, 4, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, stride=(1, 2, 1)), (2, 4, 4, 5, 4)),
}


def host(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Host(LAYERS[name][0]()).eval()


def answer(model: Any, name: str) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    shape = LAYERS[name][1]
    x = torch.randn(shape, generator=draw) if shape else torch.randint(0, 11, (2, 5), generator=draw)
    with torch.no_grad():
        return model.eval()(x)


def pair(method: str, **options: Any) -> tuple[Any, Any]:
    """The same config, ours and theirs, for a model that is one layer."""
    ours, theirs = configs(method, "llama", target_modules=["layer"], **options)
    ours.task_type = theirs.task_type = None
    return ours, theirs


def swap(layer: str, method: str, folder: Path, options: dict[str, Any], **more: Any) -> Any:
    return exchange(layer, *pair(method, **options), folder, make=host, answer=answer, **more)


MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("hira", {"r": 8}, "llama bert t5"),
    ("hira", {"r": 8, "fan_in_fan_out": True}, "gpt2"),
    ("hira", {"r": 8, "init_weights": "gaussian", "hira_dropout": 0.5}, "llama"),
    ("delora", {}, "llama bert t5"),
    ("delora", {"r": 4, "delora_lambda": 3, "lambda_pattern": {"q_proj": 7.0}, "rank_pattern": {"v_proj": 6}}, "llama"),
    ("loha", {"r": 4, "alpha": 2}, "llama bert t5"),
    ("loha", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, "llama"),
    ("lokr", {"r": 2}, "llama bert t5"),
    ("lokr", {"r": 1, "decompose_both": True, "alpha": 3}, "llama"),
    ("lokr", {"r": 64, "decompose_factor": 4}, "llama"),
    ("lokr", {"init_weights": "lycoris"}, "bert"),
]
MODELS += [
    ("gralora", {"r": 4, "hybrid_r": 2, "alpha": 8}, "llama gpt2 bert t5"),
    ("gralora", {"r": 8, "gralora_k": 4}, "llama"),
    ("peanut", {"r": 4, "depth": 2, "scaling": 0.7}, "llama bert t5"),
    ("peanut", {"r": 4, "act_fn": "gelu_new"}, "llama"),
    ("deft", {"r": 4, "alpha": 6}, "llama gpt2 bert t5"),
    ("deft", {"r": 4, "decomposition_method": "qr", "deft_dropout": 0.5}, "llama bert"),
    ("deft", {"r": 4, "para": True}, "llama bert"),
    ("deft", {"r": 64, "decomposition_method": "qr", "para": True}, "llama"),
]
GLORA: list[tuple[str, dict[str, Any], str]] = [
    ("glora", {}, "linear wide"),
    ("glora", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, "linear wide"),
    ("glora", {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"}, "linear wide"),
    ("glora", {"config_A_B": "none", "config_C": "lora", "config_D_E": "none"}, "linear"),
]
LAYER: list[tuple[str, dict[str, Any], str]] = [
    ("hira", {"r": 4}, "linear embedding conv1d conv2d conv2d-1x1 conv3d"),
    ("delora", {"r": 4}, "linear wide"),
    ("loha", {"r": 3, "alpha": 2}, "linear wide conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("loha", {"r": 3, "use_effective_conv2d": True}, "linear conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("lokr", {"r": 1}, "linear wide conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("lokr", {"r": 8}, "linear wide conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("lokr", {"r": 1, "use_effective_conv2d": True, "decompose_both": True}, "linear conv2d conv2d-groups"),
]


def spread(rows: list[tuple[str, dict[str, Any], str]]) -> list[tuple[str, dict[str, Any], str]]:
    return [(method, options, name) for method, options, names in rows for name in names.split()]


@pytest.mark.parametrize(("method", "options", "model"), spread(MODELS), ids=show)
def test_exchange_on_models(method: str, options: dict[str, Any], model: str, tmp_path: Path) -> None:
    exchange(model, *configs(method, model, **options), tmp_path)


@pytest.mark.parametrize(("method", "options", "layer"), spread(LAYER), ids=show)
def test_exchange_on_layers(method: str, options: dict[str, Any], layer: str, tmp_path: Path) -> None:
    swap(layer, method, tmp_path, options)


@pytest.mark.parametrize(("method", "options", "layer"), spread(GLORA), ids=show)
def test_exchange_of_glora(method: str, options: dict[str, Any], layer: str, tmp_path: Path) -> None:
    """peft writes a tensor of zeros for each path that is not there, in the size of the weight for A and B."""
    absent = layer == "wide" or "none" in options.values()
    swap(layer, method, tmp_path, options, **{"extra": r"\.zeros$"} if absent else {})


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
def test_exchange_of_glora_on_models(model: str, tmp_path: Path) -> None:
    exchange(model, *configs("glora", model), tmp_path, **{} if model == "bert" else {"extra": r"\.zeros$"})


@pytest.mark.parametrize("name", sorted(_ACTIVATIONS))
def test_activations_are_those_of_their_name(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 101)
    close(_ACTIVATIONS[name](x), ACT2FN[name](x).detach(), 1e-6)


def test_hira_takes_its_rank_pattern_where_peft_ignores_it_on_the_first_adapter() -> None:
    ours, theirs = pair("hira", r=4, rank_pattern={"layer": 2})
    us, them = trimtab.get_peft_model(host("linear"), ours), quiet_peft(host("linear"), theirs)
    assert us.get_base_model().layer.hira_A["default"].shape == (2, 12)
    assert them.base_model.model.layer.hira_A["default"].shape == (4, 12)


def test_lokr_on_a_1d_convolution_takes_a_core_where_peft_fails() -> None:
    ours, theirs = pair("lokr", r=1, use_effective_conv2d=True)
    us = trimtab.get_peft_model(host("conv1d"), ours)
    close(answer(us, "conv1d"), answer(host("conv1d"), "conv1d"), 1e-6)
    with pytest.raises(RuntimeError):
        answer(quiet_peft(host("conv1d"), theirs), "conv1d")


def test_padding_of_a_convolution_is_the_layer_s_where_peft_s_loha_pads_with_zeros() -> None:
    LAYERS["circular"] = (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6))
    ours, theirs = pair("loha", r=3, init_weights=False)
    them = quiet_peft(host("circular"), theirs)
    us = trimtab.get_peft_model(host("circular"), ours)
    trimtab.set_peft_model_state_dict(us, peft_state(them))
    want = answer(us.merge_and_unload(), "circular")
    us = trimtab.get_peft_model(host("circular"), pair("loha", r=3)[0])
    trimtab.set_peft_model_state_dict(us, peft_state(them))
    close(answer(us, "circular"), want)
    assert (answer(them, "circular") - want).abs().max() > 1e-3
    close(answer(them.merge_and_unload(), "circular"), want)


def peft_state(model: Any) -> dict[str, Tensor]:
    import peft

    return peft.get_peft_model_state_dict(model)

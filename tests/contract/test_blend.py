"""Adapters of any method as one LoRA: what they do together, exactly, and the best that a given rank can do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import PLAIN, Case, Host, adapted, close, parts, randomise
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from trimtab import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from trimtab.errors import NotSupported

KINDS = ("linear", "linear-no-bias", "transposed", "embedding", "conv2d", "conv2d-groups", "nf4-packed")
CASES = [c for c in PLAIN if c.kind.name in KINDS]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def change(model: PeftModel, name: str) -> tuple[Tensor, Tensor | None]:
    """What an adapter alone adds to weight and bias."""
    layer = adapted(model)
    w, b = layer.port.weight(), layer.port.bias()
    adapter = layer.adapters[name].eval()
    bias = adapter.bias(b, w)  # type: ignore[operator]
    return adapter.weight(w) - w, bias if b is None or bias is None else bias - b  # type: ignore[operator]


def mixed(case: Case) -> PeftModel:
    """The method, and a LoRA of another rank beside it."""
    model = case.model()
    size = 4 if case.kind.name == "conv2d-groups" else 3
    model.add_adapter("low", LoraConfig(r=size, lora_alpha=5, target_modules=["layer"], init_lora_weights=False))
    return model


@cases
def test_a_combination_adds_what_its_adapters_do(case: Case) -> None:
    model = mixed(case)
    if any(part.routed for part in parts(model)):
        with pytest.raises(NotSupported, match="no change of a weight"):
            model.add_weighted_adapter(["default", "low"], [0.7, -1.3], "sum", "linear")
        return
    bias_alone = case.kind.name == "embedding"
    (d, b), (low, _) = change(model, "default"), change(model, "low")
    before = model.active_adapters
    for kind in ("linear", "cat"):
        fit = model.add_weighted_adapter(["default", "low"], [0.7, -1.3], kind, kind)
        got, bias = change(model, kind)
        close(got, 0.7 * d - 1.3 * low, 2e-6 if case.kind.name != "nf4-packed" else 1e-5)
        assert fit.error < 2e-6 and abs(fit.errors["layer"] - fit.error) < 1e-9
        if b is not None and not bias_alone:
            assert bias is not None
            close(bias, 0.7 * b, 2e-6)
    assert model.active_adapters == before
    assert not any(p.requires_grad for p in adapted(model).adapters["linear"].parameters())


@cases
def test_one_adapter_cut_to_a_rank_is_the_nearest_of_that_rank(case: Case) -> None:
    model = case.model()
    if any(part.routed for part in parts(model)) or case.kind.name == "conv2d-groups":
        return
    d, _ = change(model, "default")
    fit = model.add_weighted_adapter(["default"], [2.0], "two", svd_rank=2)
    got, _ = change(model, "two")
    if not d.any():  # it moves the bias alone
        assert fit.error == 0 and not got.any()
        return
    S = torch.linalg.svdvals(2 * d.flatten(1).double())
    least = (S[2:].square().sum() / S.square().sum()).sqrt().item()
    error = ((got - 2 * d).norm() / (2 * d).norm()).item()
    assert fit.ranks == {"layer": 2} and abs(error - least) < 1e-5 and abs(fit.error - error) < 1e-5


def test_norms_take_no_low_rank_product() -> None:
    for case in (c for c in PLAIN if c.kind.name == "layernorm"):
        with pytest.raises(NotSupported, match=r"a norm layer takes no low-rank product|no change of a weight"):
            case.model().add_weighted_adapter(["default"], [1.0], "new")


def low(layer: nn.Module | None = None, **options: object) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 12, "target_modules": ["layer"], "init_lora_weights": False} | options
    model = get_peft_model(Host(layer or nn.Linear(12, 8)), LoraConfig(**fields))  # type: ignore[arg-type]
    randomise(model)
    return model


def test_rows_and_columns_of_a_combination_are_the_same_twice_and_differ_by_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        model = low()
        torch.manual_seed(seed)
        torch.rand(7)  # what was drawn before does not matter
        model.add_weighted_adapter(["default"], [1.0], "new", "dare_linear_svd", density=0.5, svd_rank=8)
        found.append(change(model, "new")[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    d, _ = change(low(), "default")
    kept = found[0].abs() > 1e-5
    close(found[0][kept], 2 * d[kept], 1e-5)
    assert 0.3 < kept.float().mean() < 0.7


# ---- layers with several weights


def experts(name: str = "default", **options: object) -> PeftModel:
    """Two slabs of three experts, stored (in, out) in one model and (out, in) in the other, and a linear layer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    made = GptOssForCausalLM(GptOssConfig(**sizes, intermediate_size=24, num_local_experts=3, head_dim=8))
    if options.pop("turned", True) is False:
        made = MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=24, num_local_experts=3))
    both = ["experts.gate_up_proj", "experts.down_proj"]
    return filled(made, name, **{"target_modules": [], "target_parameters": both} | options)


def attention(name: str = "default", **options: object) -> PeftModel:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, kdim=8, vdim=6, batch_first=True)
    return filled(Host(layer), name, **{"target_modules": ["layer"]} | options)


def filled(model: nn.Module, name: str, **options: object) -> PeftModel:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 12, "init_lora_weights": False} | options
    model = get_peft_model(model, LoraConfig(**fields), adapter_name=name)
    randomise(model)
    return model


def weights(model: PeftModel) -> dict[str, Tensor]:
    """What its active adapters make of the model's weights."""
    return {k: p.detach() for k, p in copy.deepcopy(model).merge_and_unload().named_parameters()}


def moved(model: PeftModel, *names: str) -> dict[str, Tensor]:
    before = {k: p.detach() for k, p in copy.deepcopy(model).unload().named_parameters()}
    model.set_adapter([*names])
    return {k: p - before[k] for k, p in weights(model).items()}


SEVERAL = pytest.mark.parametrize("make", [
    experts, lambda *a, **k: experts(*a, turned=False, **k), attention,
], ids=["gpt_oss", "mixtral", "attention"])  # fmt: skip


@SEVERAL
def test_single_weights_of_a_layer_are_combined_each_by_itself(make: Any, tmp_path: Path) -> None:
    model = make()
    config: Any = model.peft_config["default"]
    other = {k: getattr(config, k) for k in ("target_modules", "target_parameters")}
    model.add_adapter("low", LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **other))
    randomise(model)
    d, low = moved(model, "default"), moved(model, "low")
    for kind in ("linear", "cat"):
        fit = model.add_weighted_adapter(["default", "low"], [0.7, -1.3], kind, kind)
        got = moved(model, kind)
        assert sum(bool(t.any()) for t in d.values()) == 4  # of four weights
        for k, t in got.items():
            close(t, 0.7 * d[k] - 1.3 * low[k], 1e-5)
        assert fit.error < 2e-6 and set(fit.ranks.values()) == {7}
    model.save_pretrained(tmp_path, selected_adapters=["linear"])
    pristine = make("else").unload()
    again = PeftModel.from_pretrained(pristine, tmp_path / "linear")
    want = moved(model, "linear")
    for k, t in moved(again, "default").items():
        close(t, want[k], 1e-6)


@SEVERAL
def test_single_weights_of_a_layer_are_cut_to_the_nearest_of_a_rank(make: Any) -> None:
    model = make()
    d = moved(model, "default")
    fit = model.add_weighted_adapter(["default"], [2.0], "two", svd_rank=2)
    missed = size = 0.0
    for k, got in moved(model, "two").items():
        flat = (2 * d[k]).double()
        if not flat.any() or flat.dim() < 2:
            continue
        S = torch.linalg.svdvals(flat)
        least = S[..., 2:].square().sum().item()
        assert abs((got - 2 * d[k]).double().square().sum().item() - least) < 1e-4 * size + 1e-4 * S.square().sum().item()
        missed, size = missed + least, size + S.square().sum().item()
    assert size and set(fit.ranks.values()) == {2} and abs(fit.error - (missed / size) ** 0.5) < 1e-4


def test_a_method_on_experts_becomes_a_lora() -> None:
    """DoRA moves all of a weight: exact only at the full rank."""
    model = experts(use_dora=True)
    d = moved(model, "default")
    config, tensors = convert_to_lora(model, 16)
    assert config.target_modules == [] and len(config.target_parameters) == 4
    assert {k.rpartition("lora_")[2] for k in tensors} == {"A.weight", "B.weight"}
    model.add_weighted_adapter(["default"], [1.0], "same", svd_rank=16)
    for k, t in moved(model, "same").items():
        close(t, d[k], 1e-5)


def test_a_rescaled_adapter_of_single_weights_is_combined_as_it_acts() -> None:
    model = attention()
    adapted(model).adapters["default"].multiplier = 0.5  # as within `rescale_adapter_scale`
    d = moved(model, "default")
    model.add_weighted_adapter(["default"], [2.0], "new", "linear")
    for k, t in moved(model, "new").items():
        close(t, 2 * d[k], 1e-5)

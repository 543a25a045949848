"""Adapters of any method as one LoRA: what they do together, exactly, and the best that a given rank can do."""

from __future__ import annotations

import pytest
import torch
from kinds import PLAIN, Case, Host, adapted, close, parts, randomise
from torch import Tensor, nn

from trimtab import LoraConfig, PeftModel, get_peft_model
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

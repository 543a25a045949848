"""What holds for every method on every layer it builds on. A new file in `methods/` or `bases/` is tested by being there."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import (
    BUILDS,
    KINDS,
    PLAIN,
    REFUSED,
    SOME,
    Case,
    Host,
    Kind,
    adapted,
    close,
    definition,
    layer_methods,
    parts,
    randomise,
    tolerance,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab import PeftModel, get_peft_model, get_peft_model_state_dict
from trimtab.bases.attention import Attention, Encoder
from trimtab.bases.experts import Parameters
from trimtab.core.adapter import Adapter
from trimtab.core.base import Base, bases, port
from trimtab.core.config import load
from trimtab.core.group import groups
from trimtab.errors import NotMergeable, NotSupported, TrimtabWarning
from trimtab.mergeable import mixing

each = pytest.mark.parametrize("case", BUILDS, ids=lambda c: c.id)
plain = pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.id)
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def count(request: pytest.FixtureRequest, record_property: Any) -> None:
    if isinstance(
        case := request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None, Case
    ):
        if case in BUILDS:
            record_property("contract", f"{case.method}/{case.kind.name}")


def dtypes(case: Case) -> list[torch.dtype]:
    return DTYPES[:1] if case.kind.quantised else DTYPES


def gradients(y: Tensor, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every tensor that wants one, the input included, for one fixed direction at the output."""
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        wanted["x"] = x
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    found = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), direction, allow_unused=True), strict=True))
    noisy = not model.training and any(isinstance(m, Adapter) and m.noisy for m in model.modules())
    assert noisy or all(g is not None for g in found.values()), [n for n, g in found.items() if g is None]
    return {n: g for n, g in found.items() if g is not None}  # of noise, the size is used in training alone


def leaf(x: Tensor) -> Tensor:
    return x.requires_grad_(x.is_floating_point())


def test_every_base_is_among_the_kinds_and_every_method_fits_every_linear_layer() -> None:
    inside = {Attention, Parameters, Encoder}  # layers with several weights: test_several_weights.py
    assert set(bases().values()) - inside == {type(port(k.layer())) for k in KINDS}
    linear = [k.name for k in KINDS if port(k.layer()).op.kind == "linear"]
    assert len(linear) == 10
    for method in layer_methods():
        if load(method).adapter.on_modules and not any(c.method == method for c in PLAIN):
            continue  # made for modules that are no layers: tests/contract/test_blocks.py
        assert [c.kind.name for c in PLAIN if c.method == method and c.kind.name in linear] == linear


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_base_shows_the_weight_that_its_layer_applies(kind: Kind) -> None:
    layer = kind.layer()
    base = port(layer)
    base.pin()
    x = kind.x()
    assert tuple(base.weight().shape) == base.shape
    assert (type(base).rebuild is not Base.rebuild) and base.weight().dtype == base.dtype
    close(base.op(x, base.weight(), base.bias()), layer(x), max(base.tolerance, 1e-6))
    if not kind.quantised:
        again = base.rebuild(base.weight(), base.bias())
        assert type(again) is type(layer) and torch.equal(again(x), layer(x)) and again is not layer


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.id)
def test_what_does_not_fit_is_refused_before_anything_is_changed(case: Case) -> None:
    host = case.base()
    layer, wanted = host.layer, [p.requires_grad for p in host.parameters()]
    with pytest.raises(NotSupported, match="layer"):
        get_peft_model(host, case.config())
    assert host.layer is layer and [p.requires_grad for p in host.parameters()] == wanted
    assert "trimtab_groups" not in host.__dict__


@each
def test_forward_is_the_definition(case: Case) -> None:
    for dtype in dtypes(case):
        model, x = case.model(dtype), case.x(dtype)
        y = model(x)
        assert y.dtype == dtype
        close(y, definition(model, x).to(dtype), tolerance(model, dtype))
        with torch.no_grad():
            close(model(x), y, tolerance(model, dtype))
        if case.method and not case.options:
            assert (y - case.base(dtype)(x)).abs().max() > 1e-3  # it does something


@each
def test_merged_is_adapted_and_unmerged_is_the_original(case: Case) -> None:
    for dtype in dtypes(case):
        model, x = case.model(dtype).eval(), case.x(dtype)
        layer, y = adapted(model), model(x)
        original, top, want = layer.base_layer, layer.stack(layer.active), definition(model, x).to(dtype)
        before = {k: v.clone() for k, v in original.state_dict().items() if isinstance(v, Tensor)}
        try:
            model.merge_adapter(safe_merge=True)
        except NotMergeable:
            assert layer.base_layer is original and not layer.merged_adapters
        else:
            assert layer.base_layer is not original and layer.merged_adapters == ("default",)
            assert type(layer.base_layer) is type(original)
            weight = top.weight().detach()
            if case.kind.quantised:  # rounded once to the same grid: at most half the widest gap of the code
                error = (port(layer.base_layer).weight() - weight).abs().view(-1, 64)
                largest = weight.abs().view(-1, 64).amax(1)  # of a block; double quantisation adds a share of all
                assert (error.amax(1) <= case.kind.bound * largest + 0.02 * weight.abs().max()).all()
                close(model(x), port(layer.base_layer).op(x, port(layer.base_layer).weight(), layer.port.bias()), 2e-2)
            else:
                close(model(x), want, tolerance(model, dtype))
            with model.disable_adapter():
                assert torch.equal(model(x), original(x))
        model.unmerge_adapter()
        assert layer.base_layer is original and not layer.merged_adapters and torch.equal(model(x), y)
        after = original.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())


@each
def test_merge_and_unload_leaves_a_plain_layer(case: Case) -> None:
    model, x = case.model().eval(), case.x()
    want, stack = model(x), adapted(model).stack(("default",))
    new_bias = stack.bias() is not None and adapted(model).port.bias() is None
    try:
        with pytest.warns(TrimtabWarning, match="has a bias now") if new_bias else contextlib.nullcontext():
            plain = model.merge_and_unload()
    except NotMergeable:
        return
    assert type(plain) is Host and type(plain.layer) is type(case.base().layer)
    assert not any("adapter" in n or "base_layer" in n for n, _ in plain.named_modules())
    if not case.kind.quantised:
        close(plain(x), want, 1e-5)
        assert plain.state_dict().keys() - ({"layer.bias"} if new_bias else set()) == case.base().state_dict().keys()


NOISY = [c for c in BUILDS if load(c.method).adapter.noisy]


@pytest.mark.parametrize("case", NOISY, ids=lambda c: c.id)
def test_training_under_noise_reaches_all_of_the_adapter_and_can_be_recomputed(case: Case) -> None:
    model = case.model().train()
    _freeze_beside(model)
    x, draws = leaf(tokens(case, case.x())), []
    for forward in (model, model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        y = forward(x)
        penalty = groups(model.get_base_model())["default"].penalty()
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = (y * torch.arange(y.numel()).view_as(y).cos()).sum() + (0 if penalty is None else penalty)
        draws.append((y, dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))))
    for y, found in draws:
        assert torch.equal(y, draws[0][0]) and all(torch.equal(g, draws[0][1][n]) for n, g in found.items())
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in found.values())


PAIRS = [(a, b) for a in PLAIN for b in PLAIN if a.kind is b.kind and a.kind in SOME]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0].method}-{p[1].method}-{p[0].kind.name}")
@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]], ids=["ab", "ba"])
def test_a_stack_of_two_is_their_composition(pair: tuple[Case, Case], order: list[str]) -> None:
    dtype = torch.float32 if pair[0].kind.quantised else torch.float64
    model, x = pair[0].model(dtype, "a").eval(), pair[0].x(dtype)
    model.add_adapter("b", pair[1].config())
    model.set_adapter("b")
    randomise(model, 7)
    model.set_adapter(order)
    assert model.active_adapters == order
    layer = adapted(model)
    try:
        y = model(x)
    except NotMergeable:  # the second reads a weight, which the first has not
        assert layer.adapters[order[0]].routed
        return
    weight, bias = layer.port.weight(), layer.port.bias()
    want = definition(model, x).to(dtype)
    for name in order if not any(p.routed for p in parts(model)) else ():  # written out: one after the other
        weight, bias = layer.adapters[name].weight(weight), layer.adapters[name].bias(bias, weight)
        want = layer.port.op(x, weight, bias).to(dtype)
    close(y, want, tolerance(model, dtype))
    commute = all(load(c.method).adapter.additive for c in pair)
    for names in (order, order[:1], order[1:]):  # all, a prefix, not a prefix
        if names == order[1:] and not commute:
            with pytest.raises(NotMergeable, match="do not commute"):
                model.merge_adapter(names)
        else:
            try:
                model.merge_adapter(names)
            except NotMergeable:
                assert not layer.merged_adapters
            else:
                assert layer.merged_adapters == tuple(names)
                if not pair[0].kind.quantised:
                    close(model(x), want, 1e-10)
        model.unmerge_adapter()
        assert torch.equal(model(x), y)


@each
def test_gradients_reach_all_of_the_adapter_and_nothing_else(case: Case) -> None:
    dtype = dtypes(case)[-1]
    model = case.model(dtype)
    own = {id(p) for a in adapted(model).adapters.values() for p in a.parameters()}
    beside = {id(p) for p in model.get_base_model().beside.parameters()} if dict(case.options).get("bias") else set()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert own <= trained and not trained - own - beside - {
        id(p) for p in model.parameters() if "beside" in _name(model, p)
    }
    for p in model.get_base_model().beside.parameters():
        p.requires_grad_(False)
    _freeze_beside(model)
    x, x2 = (leaf(tokens(case, case.x(dtype))) for _ in range(2))
    got, want = gradients(model(x), model, x), gradients(definition(model, x2).to(dtype), model, x2)
    for name, g in want.items():
        assert g.abs().max() > 0, f"{name} gets no gradient"
        close(got[name], g.to(got[name].dtype), tolerance(model, dtype) * 10)


def tokens(case: Case, x: Tensor) -> Tensor:
    """Without padding: torch lets no gradient into the row of `padding_idx`, whatever else depends on it."""
    return torch.where(x == 3, 4, x) if case.kind.name == "embedding-padding" else x


def _name(model: nn.Module, p: Tensor) -> str:
    return next(n for n, q in model.named_parameters() if q is p)


def _freeze_beside(model: nn.Module) -> None:
    for n, p in model.named_parameters():
        if "beside" in n:
            p.requires_grad_(False)


@each
def test_saved_and_loaded_is_bit_equal(case: Case, tmp_path: Path) -> None:
    model, x = case.model().eval(), case.x()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    kept, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)  # as the file has it
    assert kept.keys() == loaded.keys() and all(torch.equal(v, loaded[k]) for k, v in kept.items())
    assert type(again.peft_config["default"]) is type(model.peft_config["default"])


@each
def test_it_starts_as_the_base_or_says_that_it_does_not(case: Case) -> None:
    model, x = case.fresh(), case.x()
    asked = any(k.startswith("init") and not v for k, v in case.options)  # to start elsewhere
    if asked or not all(part.starts_at_base for part in parts(model)):
        assert (model(x) - adapted(model).base_layer(x)).abs().max() > 0
    else:
        close(model(x), adapted(model).base_layer(x), 1e-6 if not case.kind.quantised else 2e-2)


@plain
def test_float32_adapters_on_a_bfloat16_base_answer_in_bfloat16(case: Case) -> None:
    low = torch.bfloat16
    model, x = case.model(low), case.x(low)
    assert {p.dtype for p in adapted(model).adapters.parameters()} == {torch.float32}
    y = model(x)
    assert y.dtype == low
    close(y.float(), definition(model, x).float(), 4e-2)
    with contextlib.suppress(NotMergeable):
        model.merge_adapter()
        close(model(x).float(), y.float(), 8e-2 if not case.kind.quantised else 0.5)
    assert model(x).dtype == low


@each
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_adapters_in_16_bits_and_under_autocast_answer_and_learn(case: Case, how: str) -> None:
    low = torch.bfloat16
    if how == "autocast":
        model, x = case.model(), case.x()
    elif case.kind.quantised:
        pytest.skip("its layer is in float32")
    else:
        model, x = case.model().to(low), case.x(low)
    with torch.autocast("cpu", low, enabled=how == "autocast"):
        y = model(x)
        model.train()(x).float().sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is None or g.isfinite().all() for g in found) and any(g is not None for g in found)
    close(y.float(), case.model()(case.x()).float(), 8e-2)


@plain
def test_it_compiles_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    x = case.x()
    try:
        torch.compile(case.base(), fullgraph=True, backend="eager")(x)
    except Exception:
        pytest.skip("the frozen layer does not compile in one graph itself")
    model = case.model()
    close(torch.compile(model.get_base_model(), fullgraph=True, backend="eager")(x), model(x), 1e-6)


@each
def test_recomputing_activations_changes_no_gradient(case: Case) -> None:
    model = case.model()
    _freeze_beside(model)
    x, x2 = leaf(case.x()), leaf(case.x())
    want = gradients(model(x), model, x)
    got = gradients(checkpoint(model, x2, use_reentrant=False), model, x2)
    assert all(torch.equal(got[n], g) for n, g in want.items())


@plain
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(case: Case, how: str) -> None:
    model, x = case.model(), case.x()
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    y = model(x)
    assert type(other) is type(model) and torch.equal(other(x), y)
    mine = {t.data_ptr() for t in model.parameters() if t.requires_grad}
    assert not mine & {t.data_ptr() for t in other.parameters()}
    randomise(other, 9)
    assert torch.equal(model(x), y)
    assert (other(x) - y).abs().max() > 1e-3
    with other.disable_adapter():
        assert torch.equal(model(x), y)
    other.delete_adapter("default")
    assert torch.equal(model(x), y)


@plain
def test_a_forward_without_gradient_leaves_everything_as_it_was(case: Case, tmp_path: Path) -> None:
    model, x = case.model(), case.x()
    want, weight = model(x), adapted(model).port.weight().clone()
    with torch.no_grad():
        for mode in (model.eval, model.train):
            if mode == model.eval or not any(part.noisy for part in parts(model)):
                close(mode()(x), want, tolerance(model, torch.float32))
        model.train(not any(part.noisy for part in parts(model)))
        with model.disable_adapter():
            model(x)
    assert torch.equal(adapted(model).port.weight(), weight)
    _freeze_beside(model)
    x2, x3 = (leaf(tokens(case, case.x())) for _ in range(2))
    got, meant = gradients(model(x2), model, x2), gradients(definition(model, x3), model, x3)
    for name, g in meant.items():
        close(got[name], g.to(got[name].dtype), max(tolerance(model, torch.float32) * 10, 1e-4))
    with contextlib.suppress(NotMergeable), torch.no_grad():
        model.merge_adapter()
        model(x)
    model.unmerge_adapter()
    assert torch.equal(adapted(model).port.weight(), weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(again(x), model.eval()(x))


@each
def test_disabled_is_the_base_bit_for_bit(case: Case) -> None:
    model, x = case.model(), case.x()
    want = adapted(model).base_layer(x)
    y = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), y)
    model.disable_adapter_layers()
    assert torch.equal(model(x), want)
    model.enable_adapter_layers()
    assert torch.equal(model(x), y)
    assert torch.equal(model.unload()(x), want)


@pytest.mark.parametrize("case", [c for c in PLAIN if c.kind.name == "conv2d-groups"], ids=lambda c: c.id)
def test_groups_that_cannot_be_merged_are_told_when_the_adapter_is_put_on(case: Case) -> None:
    """What a look at the fresh adapter says is what merging the trained one does; the look leaves nothing behind."""
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = case.fresh()
    told = ["mixes the groups of 1 convolutions (layer), which no weight of theirs holds" in str(w.message) for w in said]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert mixing(groups(model.get_base_model())["default"]) == ["layer"] * any(told)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    randomise(model)
    with pytest.raises(NotMergeable, match="mixes the groups") if any(told) else contextlib.nullcontext():
        model.eval().merge_adapter()

"""Every registered faster form against the definition it stands for, and against the adapter's own forward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kinds import PLAIN, Case, Host, adapted, close, definition, randomise
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.core.adapter import Adapted, fused, fused_forms, unfused
from trimtab.core.base import port
from trimtab.core.config import load
from trimtab.methods.lora import LoRA

FORMS = {(a, b): form for (a, b), form in fused_forms.items()}
CASES = [c for c in PLAIN if (load(c.method).adapter, type(port(c.kind.layer()))) in FORMS]
SOME = [c for c in CASES if c.kind.name in ("linear", "transposed", "held", "nf4-double")]  # one of each base
each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
some = pytest.mark.parametrize("case", SOME, ids=lambda c: c.id)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def takes(model: PeftModel, x: Tensor) -> bool:
    """Whether the layer's fused form answers for `x`, and does not decline."""
    stack: Any = adapted(model).stack_
    return stack.fused is not None and stack.fused(stack.adapter, stack.base, x) is not None


def results(
    run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, dy: Tensor | None = None
) -> dict[str, Tensor]:
    """y and the gradients of x and of all that is trained, for one direction at y."""
    x = x.detach().clone().requires_grad_()
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad and "beside" not in n} | {"x": x}
    y = run(x)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float) -> None:
    assert got.keys() == want.keys() and len(got) >= 4
    for name, value in want.items():
        assert value.abs().max() > 1e-3, f"{name} is nothing"
        close(got[name], value.to(got[name].dtype), rtol)


def test_every_form_has_a_layer_that_it_is_tested_on() -> None:
    assert {(load(c.method).adapter, type(port(c.kind.layer()))) for c in CASES} == set(FORMS)
    assert len(FORMS) == 4 and len(CASES) == 10


@each
def test_a_form_is_the_definition(case: Case) -> None:
    kinds = [(torch.float32, 1e-5 if case.kind.quantised else 1e-6)]
    for dtype, rtol in kinds if case.kind.quantised else [*kinds, (torch.float64, 1e-12)]:
        model, x = case.model(dtype), case.x(dtype)
        assert takes(model, x)
        want = results(lambda t, m=model: definition(m, t), model, x)
        same(results(model, model, x), want, rtol)
        with unfused():
            assert adapted(model).stack_.fused is not None
            same(results(model, model, x), want, 2e-5 if case.kind.quantised else rtol)


def width(case: Case) -> int:
    return port(case.kind.layer()).shape[1]


@some
@pytest.mark.parametrize("size", [0.02, 0.1], ids=["small", "large"])
def test_rounding_is_that_of_the_dtype(case: Case, size: float) -> None:
    """In bfloat16, against the same numbers in float64. y and dx: at most 1.5 times the error of the adapter's own forward,
    whose products are in float32. dA and dB are rounded three times on the way, by at most 2^-9 each."""
    n, low = width(case), torch.bfloat16
    model = case.fresh(low)
    randomise(model, size=size)
    x = torch.randn(512, n, generator=torch.Generator().manual_seed(5)).to(low)
    exact = copy.deepcopy(model).double()
    layer = adapted(exact)
    if case.kind.quantised:  # the dense layer that stands for it
        weight, bias = port(layer.base_layer).weight(), layer.base_layer.bias
        plain = nn.Linear(n, weight.shape[0])
        plain.weight, plain.bias = nn.Parameter(weight.double(), False), nn.Parameter(bias.double(), False)
        layer.base_layer, layer.port = plain, port(plain)
        layer.restack()
    dy = torch.randn(512, port(layer.base_layer).shape[0], generator=torch.Generator().manual_seed(6)).to(low)
    want = results(exact, exact, x.double(), dy)
    assert takes(model, x)
    got = results(model, model, x, dy)
    with unfused():
        own = results(model, model, x, dy)

    def error(found: dict[str, Tensor], name: str) -> float:
        return ((found[name].double() - want[name]).norm() / want[name].norm()).item()

    assert got["y"].dtype == got["x"].dtype == low
    for name in ("y", "x"):
        assert error(got, name) <= 1.5 * error(own, name) < 0.01
    factors = [n for n in want if "lora_" in n]
    assert len(factors) == 2
    for name in factors:
        assert got[name].dtype == torch.float32
        assert error(got, name) <= 3 * 2**-9


def small_llama(layers: int = 2, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 8}
    model = LlamaModel(LlamaConfig(**sizes, **heads, max_position_embeddings=128)).to(dtype)
    made = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomise(made, size=0.05)
    return made


def states(model: PeftModel) -> Callable[[Tensor], Tensor]:
    return lambda x: model.get_base_model()(inputs_embeds=x, use_cache=False).last_hidden_state


def test_a_network_s_gradient_is_as_near_to_the_truth_as_unfused() -> None:
    """What bfloat16 costs a network is far more than what the thin products add: 1.05 to 1.15 times, measured."""
    model = small_llama(dtype=torch.bfloat16)
    exact, x = copy.deepcopy(model).double(), torch.randn(4, 40, 96).bfloat16()
    want = results(states(exact), exact, x.double())
    got = results(states(model), model, x)
    with unfused():
        own = results(states(model), model, x)

    def error(found: dict[str, Tensor], part: str) -> float:
        names = [n for n in want if part in n]
        return torch.cat([(found[n].double() - want[n]).flatten() / want[n].norm() for n in names]).norm().item()

    for part in ("lora_A", "lora_B", "x"):
        assert error(got, part) <= 1.3 * error(own, part)


@each
def test_what_is_kept_for_the_backward(case: Case) -> None:
    """x once and x A^T, in bytes; W and the factors are there anyway, and no dense copy of a 4-bit weight is kept."""
    low = torch.bfloat16
    model, n = case.model(low), width(case)
    x = torch.randn(40, n).to(low).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if (place := t.untyped_storage().data_ptr()) not in known:
            kept[place] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert sorted(t.untyped_storage().nbytes() for t in kept.values()) == sorted([40 * n * 2, 40 * 4 * 2])
    assert x.untyped_storage().data_ptr() in kept
    saved: list[list[Tensor]] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        """What a compiled forward hands to its backward, beside what it was given."""
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        saved.append([o.meta["val"] for o in outputs if o is not None and o.op != "placeholder"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    torch.compile(model.get_base_model(), backend=backend, fullgraph=True)(x).sum().backward()
    forward = [v for v in saved[0] if isinstance(v, Tensor)][1:]  # the first is y
    factors = 4 * (n + y.shape[-1]) * 2  # a compiler may keep the factors as they were cast
    assert len(saved) == 2 and 0 <= sum(v.nbytes for v in forward) - 40 * n * 2 - 40 * 4 * 2 <= factors + 8


@each
def test_nothing_is_kept_for_a_frozen_adapter(case: Case) -> None:
    model, n = case.model(), width(case)
    want = results(lambda t: definition(model, t), model, torch.randn(5, n, generator=torch.Generator().manual_seed(8)))
    model.requires_grad_(False)
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(8)).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert {id(t) for t in kept} <= {id(p) for p in model.parameters()}
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    close(torch.autograd.grad(y, x, direction)[0], want["x"], 1e-5)


@some
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "x"])
def test_a_gradient_that_nobody_wants_is_not_formed(case: Case, frozen: str) -> None:
    model, x = case.model(), case.x()
    want = results(lambda t: definition(model, t), model, x)
    own = {n: p.requires_grad_(False) for n, p in model.named_parameters() if frozen in n.split(".")}
    assert bool(own) == (frozen != "x")
    if frozen == "x":
        y = model(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float())
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(got) == 2 and x.grad is None
    else:
        got = results(model, model, x)
        assert not set(own) & set(got)
    for name, value in got.items():
        close(value, want[name], 1e-5)


@some
def test_shapes_and_strides_are_the_caller_s_business(case: Case) -> None:
    """One vector, no rows at all, an input and a direction that are not contiguous; and the output may be written into."""
    model, n = case.model(), width(case)
    out = adapted(model).port.shape[0]
    draw = torch.Generator().manual_seed(4)
    for x in (
        torch.randn(n, generator=draw),
        torch.randn(n, 7, generator=draw).T,
        torch.randn(2, 1, 3, n, generator=draw).transpose(0, 2),
    ):
        same(results(model, model, x), results(lambda t: definition(model, t), model, x), 1e-5)
        for dy in (torch.ones(()).expand(*x.shape[:-1], out), torch.randn(out, *x.shape[:-1]).movedim(0, -1)):
            got = results(model, model, x, dy)
            same(got, results(lambda t: definition(model, t), model, x, dy.contiguous()), 1e-5)
    empty = torch.zeros(0, 3, n, requires_grad=True)
    y = model(empty)
    assert y.shape == (0, 3, out)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    x = case.x()
    same(results(lambda t: model(t).mul_(2), model, x), results(lambda t: 2 * definition(model, t), model, x), 1e-5)


@each
def test_recomputed_frozen_and_copied_answers_are_the_same(case: Case) -> None:
    model, x = case.model(), case.x()
    want = results(model, model, x)
    for run in (model.eval(), lambda t: checkpoint(model, t, use_reentrant=False), copy.deepcopy(model)):
        got = results(run, run if isinstance(run, PeftModel) else model, x)
        assert all(torch.equal(got[n], v) for n, v in want.items())
    with torch.no_grad():
        close(model(x), want["y"], 1e-5)
        rows = x.flatten(0, -2).repeat(16, 1)
        assert takes(model, rows) and not takes(model, x)
        close(model(rows)[: want["y"].numel() // want["y"].shape[-1]].view_as(want["y"]), want["y"], 1e-6)


@some
def test_the_stack_decides_which_form_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = next(p for p in FORMS if p == (load(case.method).adapter, type(port(case.kind.layer()))))
    calls: list[Any] = []
    monkeypatch.setitem(fused_forms, pair, lambda *a: calls.append(a) or FORMS[pair](*a))
    model, x = case.model().eval(), case.x()
    layer, want = adapted(model), definition(model, x)

    def count(run: Callable[[], object]) -> int:
        calls.clear()
        run()
        return len(calls)

    assert count(lambda: model(x)) == 1
    with model.disable_adapter():
        assert count(lambda: model(x)) == 0
    with unfused(), contextlib.suppress(ZeroDivisionError):
        assert count(lambda: model(x)) == 0
        with unfused():
            _ = 1 / 0
    assert count(lambda: model(x)) == 1
    model.merge_adapter()
    assert count(lambda: model(x)) == 0
    model.unmerge_adapter()
    assert count(lambda: model(x)) == 1
    close(model(x), want, 1e-5)
    model.add_adapter("second", case.config())
    model.set_adapter(["default", "second"])  # the inner one is fused; the outer stands on no plain layer
    assert count(lambda: model(x)) == 1
    assert type(layer.stack_) is Adapted and layer.stack_.fused is None
    model.set_adapter("second")
    assert count(lambda: model(x)) == 1


def test_a_form_is_for_the_very_types_it_was_registered_for() -> None:
    class Another(LoRA):
        def forward(self, x: Tensor, base: Any) -> Tensor:
            return base(x) + 1

    base = port(nn.Linear(4, 4))
    model = get_peft_model(Host(nn.Linear(4, 4)), LoraConfig(target_modules=["layer"]))
    adapter: Any = adapted(model).adapters["default"]
    assert Adapted(base, adapter).fused is not None
    adapter.__class__ = Another
    assert Adapted(base, adapter).fused is None
    fused(Another, type(base))(lambda adapter, base, x: None)  # one that always declines
    try:
        stack = Adapted(base, adapter)
        assert stack.fused is not None and torch.equal(stack(torch.ones(4)), base(torch.ones(4)) + 1)
    finally:
        del fused_forms[Another, type(base)]


def _hook(model: PeftModel) -> None:
    adapted(model).base_layer.register_forward_hook(lambda module, args, y: y + 1)


def _hook_the_adapter(model: PeftModel) -> None:
    adapted(model).adapters["default"].register_forward_hook(lambda module, args, y: y + 1)


def _replace_forward(model: PeftModel) -> None:
    layer: Any = adapted(model).base_layer
    old = layer.forward
    layer.forward = lambda x: old(x) + 1


def _train_the_weight(model: PeftModel) -> None:
    adapted(model).base_layer.weight.requires_grad_()


def _train_the_bias(model: PeftModel) -> None:
    adapted(model).base_layer.bias.requires_grad_()


class Marked(Tensor):
    """A weight of a kind of its own, as quantised and sharded ones are."""


def _mark(model: PeftModel) -> None:
    layer: Any = adapted(model).base_layer
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Marked), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [_hook, _hook_the_adapter, _replace_forward, _train_the_weight, _train_the_bias, _mark],
    ids=lambda f: f.__name__.strip("_"),
)
def test_what_a_form_does_not_know_is_left_to_the_adapter(change: Callable[[PeftModel], None]) -> None:
    case = next(c for c in CASES if c.kind.name == "linear")
    model, x = case.model(), case.x()
    before = results(model, model, x)
    change(model)
    assert not takes(model, x)
    got = results(model, model, x)
    with unfused():
        want = results(model, model, x)
    assert all(torch.equal(got[n], v) for n, v in want.items())
    moved = 1 if change in (_hook, _hook_the_adapter, _replace_forward) else 0
    assert (got["y"] - before["y"] - moved).abs().max() < 1e-5
    assert (got.keys() > before.keys()) == (change in (_train_the_weight, _train_the_bias))


def test_a_bias_on_b_other_dtypes_and_functorch_are_left_to_the_adapter() -> None:
    x = torch.randn(70, 12)
    biased = get_peft_model(Host(nn.Linear(12, 8)), LoraConfig(target_modules=["layer"], lora_bias=True))
    randomise(biased)
    assert not takes(biased, x)
    same(results(biased, biased, x), results(lambda t: definition(biased, t), biased, x), 1e-6)
    case = next(c for c in CASES if c.kind.name == "linear")
    model = case.model()
    assert takes(model, x)
    with pytest.raises(RuntimeError):
        model(x.bfloat16())  # as without adapters
    half = case.model(torch.float16)
    assert not takes(half, x.half()) and half(x.half()).dtype == torch.float16
    layer = adapted(model)
    values = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    got = torch.func.jacrev(lambda v: torch.func.functional_call(layer, v, (x[:1],)).sum())(values)
    want = torch.autograd.grad(definition(model, x[:1]).sum(), list(values.values()))
    for name, g in zip(values, want, strict=True):
        close(got[name], g, 1e-5)


def test_autocast_to_the_dtype_of_the_layer_is_as_without_and_to_another_is_the_adapter_s_own() -> None:
    case = next(c for c in CASES if c.kind.name == "linear")
    low, x = case.model(torch.bfloat16), case.x(torch.bfloat16)
    want = results(low, low, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes(low, x)
        got = results(low, low, x)
        assert all(torch.equal(got[n], v) for n, v in want.items())
        full = case.model()
        assert not takes(full, case.x()) and full(case.x()).dtype == torch.bfloat16


@some
def test_dropout_is_the_adapter_s(case: Case) -> None:
    """With the same random numbers the same rows are dropped, and evaluation drops nothing."""
    config = case.config(lora_dropout=0.4)
    model = get_peft_model(Host(case.kind.layer()), config)
    randomise(model)
    x = case.x()

    def seeded(t: Tensor) -> Tensor:
        torch.manual_seed(11)
        return model(t)

    assert takes(model, x)
    got = results(seeded, model, x)
    with unfused():
        want = results(seeded, model, x)
    same(got, want, 2e-5)
    assert (got["y"] - definition(model, x)).abs().max() > 1e-3
    model.eval()
    same(results(model, model, x), results(lambda t: definition(model, t), model, x), 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_gradient_can_be_differentiated_again(dropout: float) -> None:
    case = next(c for c in CASES if c.kind.name == "linear")
    model = get_peft_model(Host(case.kind.layer(torch.float64)).double(), case.config(lora_dropout=dropout))
    randomise(model)
    parts = [p for n, p in model.named_parameters() if "lora_" in n]
    x = case.x(torch.float64).requires_grad_()

    def second() -> list[Tensor]:
        torch.manual_seed(11)
        first = torch.autograd.grad(model(x).pow(3).sum(), [x, *parts], create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, *parts]))  # type: ignore[arg-type]

    assert takes(model, x)
    got = second()
    with unfused():
        for g, want in zip(got, second(), strict=True):
            assert want.abs().max() > 1e-3
            close(g, want, 1e-12)


@some
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_form_compiles_in_one_graph(case: Case, backend: str) -> None:
    model, x = case.model(), case.x()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    same(results(compiled, model, x), results(model, model, x), 1e-6)


def test_one_compiled_layer_serves_all_layers_and_lengths() -> None:
    """Each decoder layer is compiled with dynamic shapes: one graph in all, and the gradients of every layer are its own."""
    model = small_llama(3)
    xs = [torch.randn(b, t, 96) for b, t in ((2, 20), (3, 25), (2, 40))]
    want = [results(states(model), model, x) for x in xs]
    for layer in model.get_base_model().layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for x, values in zip(xs, want, strict=True):
        same(results(states(model), model, x), values, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

"""One first product for adapters that read the same input: who they are is seen, and a pass is right whoever reads what."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kinds import close, randomise
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.core.adapter import unfused
from trimtab.engine.compile import decoder_layers
from trimtab.engine.forward import Engine
from trimtab.fused import lora
from trimtab.methods.lora import LoRA

RANK = 3
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Three(nn.Module):
    """Three layers that may read one input. `turn`: k reads another one; `without`: k is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 7)
        self.turn = self.without = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        q = self.q(x).sum(-1, keepdim=True)
        if not self.without:
            q = q * self.k(2 * x if self.turn else x).sum(-1, keepdim=True)
        return q + self.v(x)


def three(**more: Any) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    model = get_peft_model(Three().double(), LoraConfig(r=RANK, target_modules=["q", "k", "v"], **more))
    randomise(model)
    return model, model.get_base_model()


def adapters(model: nn.Module) -> dict[str, Any]:
    return {name.split(".adapters")[0].rsplit(".", 1)[-1]: m for name, m in model.named_modules() if type(m) is LoRA}


def mates(model: nn.Module) -> dict[str, list[str]]:
    found = adapters(model)
    names = {id(m): n for n, m in found.items()}
    return {n: [names[id(m)] for m in a.mates] for n, a in found.items()}


def gradients(model: Any, x: Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    trained = {n.replace("_orig_mod.", ""): p for n, p in model.named_parameters() if p.requires_grad} | {"x": x}
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    found = torch.autograd.grad(y, list(trained.values()), dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(trained, found, strict=True))}


def first_products(model: nn.Module, x: Tensor) -> list[int]:
    """Columns of the first products of a compiled pass; the pass has the values and gradients of the definition."""
    wide: list[int] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.mm.default and node.meta["val"].shape[-1] % RANK == 0:
                wide.append(int(node.meta["val"].shape[-1]))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    got = gradients(torch.compile(model, backend=backend, fullgraph=True), x)
    with unfused():
        want = gradients(model, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            assert got[name] is None or not got[name].any(), name
        else:
            close(got[name], value, 1e-12)
    return wide


def test_who_reads_one_input_is_seen_and_answered_together_where_it_is_compiled() -> None:
    model, inner = three()
    before = gradients(model, X)
    assert mates(model) == {"q": ["k", "v"], "k": [], "v": []}
    assert first_products(inner, X) == [3 * RANK]
    assert all(a.found[0] is None for a in adapters(model).values() if "found" in vars(a))
    after = gradients(model, X)
    assert all(torch.equal(after[n], value) for n, value in before.items())  # no pass rounds by what came before it
    assert first_products(inner, X) == [3 * RANK]


def test_without_a_pass_to_see_it_each_is_answered_by_itself() -> None:
    assert first_products(three()[1], X) == [RANK] * 3


def test_who_reads_something_else_is_not_given_the_part_of_another_input() -> None:
    model, inner = three()
    gradients(model, X)
    inner.turn = True
    assert first_products(inner, X) == [3 * RANK, RANK]  # k's part of the first is in vain
    gradients(model, X)  # v is not called next after q: it goes by itself
    assert mates(model)["q"] == [] and first_products(inner, X) == [RANK] * 3


def test_who_is_not_called_gets_nothing() -> None:
    model, inner = three()
    gradients(model, X)
    inner.without = True
    assert first_products(inner, X) == [3 * RANK]
    gradients(model, X)
    assert mates(model)["q"] == ["v"] and first_products(inner, X) == [2 * RANK]


def test_frozen_dropped_or_absent_weights_do_not_join() -> None:
    model, inner = three()
    gradients(model, X)
    of_k = adapters(model)["k"]
    of_k.lora_A.weight.requires_grad_(False)
    assert first_products(inner, X) == [2 * RANK, RANK]
    of_k.lora_A.weight.requires_grad_(True)
    weight, of_k.lora_A.weight = of_k.lora_A.weight, nn.Parameter(torch.zeros(0, dtype=torch.float64))
    assert not lora._joins(of_k, X)  # as where a run keeps each rank's share alone
    of_k.lora_A.weight = weight
    assert lora._joins(of_k, X)
    of_k.drop.p = 0.5
    assert not lora._joins(of_k.train(), X) and lora._joins(of_k.eval(), X)


def test_a_copy_shares_its_own() -> None:
    model, _ = three()
    gradients(model, X)
    other = copy.deepcopy(model)
    assert mates(other) == mates(model)
    assert first_products(other.get_base_model(), X) == [3 * RANK]


def test_a_model_that_the_engine_has_tried_shares_from_its_first_step_on() -> None:
    sizes: dict[str, Any] = {"hidden_size": 50, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 91}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=5, num_key_value_heads=5, head_dim=10)).double()
    model = get_peft_model(llama, LoraConfig(r=RANK, target_modules="all-linear"))
    randomise(model)
    Engine(model)
    layer = decoder_layers(model)[1]
    assert {n: m for n, m in mates(layer).items() if m} == {"q_proj": ["k_proj", "v_proj"], "gate_proj": ["up_proj"]}
    cos = torch.ones(1, 6, 10, dtype=torch.float64)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y: Any = self.layer(x, position_embeddings=(cos, 0 * cos))
            return y

    x = torch.randn(1, 6, 50, dtype=torch.float64)
    assert first_products(Layer(), x) == [3 * RANK, RANK, 2 * RANK, RANK]

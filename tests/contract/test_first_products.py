"""One first product for adapters that read the same input: who they are is seen, and a pass is right whoever reads what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kinds import close, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.core.adapter import unfused
from trimtab.engine.forward import Engine
from trimtab.fused import lora
from trimtab.methods.lora import LoRA


class Three(nn.Module):
    """Three layers that may read one input. `turn`: k reads another one; `without`: k is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 6)
        self.turn = self.without = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        q = self.q(x).sum(-1, keepdim=True)
        k = torch.ones(()) if self.without else self.k(2 * x if self.turn else x).sum(-1, keepdim=True)
        return q * k + self.v(x)


def three(**more: Any) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    model = get_peft_model(Three().double(), LoraConfig(r=3, target_modules=["q", "k", "v"], **more))
    randomise(model)
    return model, model.get_base_model()


def adapters(model: nn.Module) -> dict[str, LoRA]:
    return {name.split(".adapters")[0]: m for name, m in model.named_modules() if type(m) is LoRA}


def mates(model: nn.Module) -> dict[str, list[str]]:
    """The last part of the names of those who read what a layer reads, after it."""
    found, names = adapters(model), {id(m): n.rsplit(".", 1)[-1] for n, m in adapters(model).items()}
    return {n: [names[id(m)] for m in vars(a).get("mates", ())] for n, a in found.items()}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters each first product was for."""
    counts: list[int] = []
    plain = lora.First

    class Counted(plain):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *A: Tensor) -> Any:
            counts.append(len(A))
            return plain.forward(ctx, x, *A)

    monkeypatch.setattr(lora, "First", Counted)
    return counts


def gradients(model: Any, x: Tensor) -> dict[str, Tensor | None]:
    x = x.clone().requires_grad_()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad} | {"x": x}
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    found = torch.autograd.grad(y, list(trained.values()), dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(trained, found, strict=True))}


def right(model: Any, x: Tensor) -> None:
    got = gradients(model, x)
    with unfused():
        want = gradients(model, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            close(got[name], value, 1e-12)


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_who_reads_one_input_is_seen_on_one_pass_and_used_on_the_next(products: list[int]) -> None:
    model, _ = three()
    right(model, X)
    assert products == [1, 1, 1]
    assert mates(model) == {"base_model.model.q": ["k", "v"], "base_model.model.k": [], "base_model.model.v": []}
    products.clear()
    right(model, X)
    assert products == [3]
    with torch.no_grad():  # nothing is laid by where nothing can notice that x was written into between two reads
        rows = X.repeat(20, 1)
        close(model(rows)[:5], model(X), 1e-12)
    assert all(a.found[0] is None for a in adapters(model).values())


def test_who_reads_something_else_is_no_longer_asked_along(products: list[int]) -> None:
    model, inner = three()
    right(model, X)
    inner.turn = True
    products.clear()
    right(model, X)
    assert products == [3, 1]  # k's part was of the wrong input, and is not used
    right(model, X)
    assert products == [3, 1, 2, 1] and mates(model)["base_model.model.q"] == ["v"]
    inner.turn = False
    products.clear()
    right(model, X)
    right(model, X)
    assert products == [2, 1, 3] and set(mates(model)["base_model.model.q"]) == {"k", "v"}


def test_who_is_not_called_gets_no_gradient_and_is_dropped(products: list[int]) -> None:
    model, inner = three()
    right(model, X)
    inner.without = True
    right(model, X)
    assert products[3:] == [3] and adapters(model)["base_model.model.k"].found[0] is not None
    right(model, X)
    assert products[4:] == [2] and mates(model)["base_model.model.q"] == ["v"]
    inner.without = False
    right(model, X)
    right(model, X)
    assert products[5:] == [2, 1, 3]


def test_frozen_dropped_or_absent_weights_do_not_join(products: list[int]) -> None:
    model, _ = three()
    right(model, X)
    of_k: Any = adapters(model)["base_model.model.k"]
    of_k.lora_A.weight.requires_grad_(False)
    right(model, X)
    assert products[3:] == [2, 1]
    of_k.lora_A.weight.requires_grad_(True)
    weight, of_k.lora_A.weight = of_k.lora_A.weight, nn.Parameter(torch.zeros(0, dtype=torch.float64))
    assert not lora._joins(of_k, X)  # as where a run keeps each rank's share alone
    of_k.lora_A.weight = weight
    assert lora._joins(of_k, X)
    products.clear()
    model, _ = three(lora_dropout=0.5)
    model.train()
    for _ in range(2):
        torch.manual_seed(4)
        got = gradients(model, X)
        torch.manual_seed(4)
        with unfused():
            close(got["y"], gradients(model, X)["y"], 1e-12)
    assert products == [1] * 6


def test_recomputed_and_copied_models_share_their_own(products: list[int]) -> None:
    model, _ = three()
    right(model, X)
    want = gradients(model, X)
    again = gradients_of_checkpoint(model)
    assert all(torch.equal(again[n], value) for n, value in want.items() if value is not None)
    other = copy.deepcopy(model)
    assert mates(other) == mates(model)
    right(other, X)
    ours, theirs = adapters(model).values(), adapters(other).values()
    assert not {id(m) for a in theirs for m in vars(a)["mates"]} & {id(a) for a in ours}


def gradients_of_checkpoint(model: PeftModel) -> dict[str, Any]:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.model, x, use_reentrant=False)

    return {n.removeprefix("model."): g for n, g in gradients(Recomputed(), X).items()}


def test_a_model_that_the_engine_has_tried_shares_from_its_first_step_on(products: list[int]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 90}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2)).double()
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    Engine(peft)
    layer = "base_model.model.model.layers.1."
    found = {n.removeprefix(layer): m for n, m in mates(peft).items() if n.startswith(layer) and m}
    assert found == {"self_attn.q_proj": ["k_proj", "v_proj"], "mlp.gate_proj": ["up_proj"]}
    products.clear()
    peft(input_ids=torch.arange(7)[None]).logits.sum().backward()
    assert products == [3, 1, 2, 1] * 2

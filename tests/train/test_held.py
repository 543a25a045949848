"""Weights held in 16 bits under float32 products: every number is that of the float32 model, bit for bit."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny_llama import base, collate, llama, rows
from torch import Tensor

from trimtab.bases.held import HeldLinear, held, hold
from trimtab.core.config import config_for
from trimtab.export.merge import merge
from trimtab.model import get_peft_model
from trimtab.train import load
from trimtab.train.device import emulated
from trimtab.train.options import TrainOptions
from trimtab.train.run import run

LOW = torch.bfloat16


def both(**options: Any) -> tuple[Any, Any]:
    """An adapter on a model that stores bfloat16: its base widened, and held."""
    found = []
    for prepare in (lambda m: m.float(), lambda m: hold(m) and m):
        model = prepare(llama().to(LOW))
        torch.manual_seed(1)
        made = get_peft_model(model, config_for("lora", task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options))
        for p in made.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        found.append(made)
    return found[0], found[1]


def results(model: Any) -> dict[str, Tensor]:
    batch = {k: v for k, v in collate(rows(3)).items() if k != "rows"}
    out = model(**batch)
    out.loss.backward()
    grads = {n.replace(".base_layer", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def held_layers(model: Any) -> list[HeldLinear]:
    return [m for m in model.modules() if type(m) is HeldLinear]


def test_the_numbers_are_those_of_float32() -> None:
    wide, narrow = both()
    assert (held(base(wide)), held(base(narrow))) == ("", "bfloat16")
    want = results(wide)
    assert len(want) == 1 + 2 * 2 * 7 and equal(results(narrow), want)  # two layers of seven, A and B


def test_layers_without_an_adapter_pass_gradients_on_without_a_wide_copy() -> None:
    wide, narrow = both(exclude_modules=".*mlp.*")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        got = results(narrow)
    assert equal(got, results(wide))
    assert {m.weight.data_ptr() for m in held_layers(narrow) if m.weight.shape[0] == 48} <= set(kept)


def test_only_plain_linear_layers_hold_16_bits() -> None:
    model = llama().to(LOW)
    head = model.get_output_embeddings()
    assert hold(model) and len(held_layers(model)) == 14
    narrow = {n for n, p in model.named_parameters() if p.dtype is LOW}
    assert len(narrow) == 14 and all("proj.weight" in n for n in narrow)
    assert head.weight.dtype is torch.float32 and model.dtype is torch.float32


def test_merged_and_unmerged() -> None:
    wide, narrow = both()
    wide.merge_adapter(), narrow.merge_adapter()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(narrow(input_ids=ids).logits, wide(input_ids=ids).logits)  # the merged weight is not rounded
    narrow.unmerge_adapter()
    assert held(base(narrow)) == "bfloat16"


def test_a_weight_that_something_else_reads_too_is_wide() -> None:
    model = llama().to(LOW)
    tied = model.model.layers[0].self_attn.k_proj  # (16, 32)
    model.beside = torch.nn.Embedding(16, 32)
    model.beside.weight = tied.weight
    assert hold(model) and len(held_layers(model)) == 13 and tied.weight.dtype is torch.float32


def test_a_layer_that_is_not_called_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate, say, whose weight is read with a cast of its own: that would be a product in 16 bits, and no error."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def casts(self: Any, x: Tensor) -> Tensor:
        gate = F.linear(x.to(self.gate_proj.weight.dtype), self.gate_proj.weight).to(x.dtype)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", casts)
    model, want = llama().to(LOW), llama().to(LOW).float()
    assert hold(model)
    wide = {n for n, m in model.named_modules() if type(m) is HeldLinear and m.weight.dtype is torch.float32}
    assert wide == {f"model.layers.{i}.mlp.gate_proj" for i in range(2)}
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, want(input_ids=ids).logits)


def test_code_that_reads_weights_by_itself_gets_a_float32_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def by_itself(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(F.linear(x, self.gate_proj.weight)) * self.up_proj(x))

    def lowers(self: Any, x: Tensor) -> Tensor:
        x = x.to(self.down_proj.weight.dtype)  # as T5 does
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    for forward in (by_itself, lowers):
        monkeypatch.setattr(LlamaMLP, "forward", forward)
        want = llama().to(LOW).float()
        model = llama().to(LOW)
        assert not hold(model) and held(model) == ""
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(model(input_ids=ids).logits, want(input_ids=ids).logits)


def test_a_model_of_the_callers_in_emulated_bfloat16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, said in ((True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert ("many times slower" in emulated(llama().to(LOW))) is said
    model = llama().to(LOW)
    hold(model)
    assert emulated(model) == emulated(llama()) == ""


# ---- which models are held


@pytest.fixture(scope="module")
def stored(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as most are published: in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "low"
    load.load_model(model_folder, dtype=LOW).save_pretrained(folder)
    load.load_tokenizer(model_folder).save_pretrained(folder)
    return folder


def of(folder: Path, dtype: torch.dtype, **more: Any) -> str:
    return held(load.load_model(folder, dtype=dtype, held=True, **more))


@pytest.mark.parametrize("native", [True, False])
def test_what_is_held(stored: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert of(stored, torch.float32) == "bfloat16"
    assert of(stored, LOW) == ("" if native else "bfloat16")
    assert of(model_folder, torch.float32) == ""  # stored in float32: nothing is rounded unasked
    assert of(model_folder, LOW) == ("" if native else "bfloat16")
    assert held(load.load_model(stored, dtype=torch.float32)) == ""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_layers_compute_in_what_the_chip_has(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, LOW), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        model = load.load_model(stored, dtype=LOW, load_in_4bit=True, held=True)
        layer = model.model.layers[0].self_attn.q_proj
        assert (layer.compute_dtype, model.get_input_embeddings().weight.dtype) == (dtype, dtype)
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype is dtype


def test_a_run_says_so_and_its_folder_is_that_of_float32(stored: Path, rows: Path, tmp_path: Path) -> None:
    def trained(name: str, **over: Any) -> tuple[bytes, str, Any]:
        said = io.StringIO()
        given: dict[str, Any] = dict(model=str(stored), dataset=[str(rows)], batch_size=8, max_steps=3, dtype="float32")
        given |= {"output_dir": str(tmp_path / name), "sample_prompts": ["Hello"]}
        made = run(TrainOptions(**given | over), console=Console(file=said, width=200))
        return (tmp_path / name / "adapter_model.safetensors").read_bytes(), said.getvalue(), made.record

    narrow, said, record = trained("narrow")
    assert "linear layers of the base hold their weights in bfloat16 and multiply in float32" in said
    assert record.dtype == "float32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_narrow", lambda *_: None)
        wide, said, _ = trained("wide")
    assert "hold their weights" not in said and narrow == wide
    report = merge(tmp_path / "narrow", tmp_path / "merged")
    assert report.difference.maximum < 1e-5

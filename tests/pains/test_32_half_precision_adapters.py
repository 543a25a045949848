"""On a 16-bit base whatever is trained is float32, and so are its gradients: no scaler has anything to refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from situations import IDS, llama, logits, lora, move
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from trimtab import PeftModel, get_peft_model
from trimtab.data.encode import Example
from trimtab.data.pack import pack
from trimtab.engine.forward import Engine

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "whole ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole ends, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "whole block": {"modules_to_save": ["mlp", "norm"]},
    "whole attention": {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]},
    "rows": {"trainable_token_indices": [5, 9]},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
}


def base(case: str, dtype: torch.dtype = torch.float32) -> Any:
    model = llama(tie_word_embeddings="tied" in case, attention_bias="biases" in case)
    for p in model.parameters():
        p.data = p.data.to(dtype).float()  # what the dtype can hold, so that the float32 model is the same one
    return model.to(dtype)


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@HALVES
@pytest.mark.parametrize("case", CASES)
def test_new_trained_saved_and_loaded(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(base(case, dtype), lora(**CASES[case]))
    move(model, size=0.02)
    wide = get_peft_model(base(case, dtype).float(), lora(**CASES[case]))
    for p, q in zip(trained(wide).values(), trained(model).values(), strict=True):
        p.data.copy_(q)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = PeftModel.from_pretrained(base(case, dtype), tmp_path, is_trainable=True)
    for each in (model, again, wide):
        out = each(input_ids=IDS, labels=IDS)
        out.loss.backward()
        assert out.logits.dtype == (torch.float32 if each is wide else dtype)
        tensors = trained(each).values()
        assert {p.dtype for p in tensors} == {p.grad.dtype for p in tensors} == {torch.float32}
        frozen = {p.dtype for p in each.parameters() if not p.requires_grad}
        assert frozen == {torch.float32 if each is wide else dtype}
    for name, p in trained(again).items():
        assert torch.equal(p, trained(model)[name]) and torch.equal(p.grad, trained(model)[name].grad)
        apart = (p.grad - trained(wide)[name].grad).norm() / trained(wide)[name].grad.norm().clamp(min=1e-4)
        assert apart < 16 * torch.finfo(dtype).eps, name
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(wide)).abs().max() < 8 * torch.finfo(dtype).eps * logits(wide).abs().max()
    if "tied" in case:
        ends = [m.adapters["default"].copy.weight for m in (model.lm_head, model.get_input_embeddings())]
        assert ends[0] is ends[1]


@HALVES
@pytest.mark.parametrize("case", [c for c in CASES if "whole" in c])
def test_merged_it_is_the_base_dtype_again_and_answers_the_same(case: str, dtype: torch.dtype) -> None:
    model = get_peft_model(base(case, dtype), lora(**CASES[case]))
    with torch.no_grad():
        for name, p in trained(model).items():
            if "copy" in name:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    want = logits(model)
    assert (want - logits(base(case, dtype))).abs().max() > 0
    copies = {n: p.detach().clone() for n, p in trained(model).items() if "copy" in n}
    model.merge_adapter()
    assert torch.equal(logits(model), want)  # to the last bit
    model.unmerge_adapter()
    assert torch.equal(logits(model), want) and all(torch.equal(trained(model)[n], p) for n, p in copies.items())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base(case, dtype)))
    plain = model.merge_and_unload()
    assert {p.dtype for p in plain.parameters()} == {dtype} and torch.equal(logits(plain), want)
    for name, p in copies.items():
        path = name.removeprefix("base_model.model.").replace("adapters.default.copy.", "")
        assert torch.equal(plain.get_parameter(path), p.to(dtype)), path  # rounded once


def test_steps_that_16_bits_do_not_resolve_add_up() -> None:
    model = get_peft_model(base("whole ends", torch.bfloat16), lora(**CASES["whole ends"]))
    head = model.lm_head.adapters["default"].copy.weight
    start = head.detach().clone()
    with torch.no_grad():
        for _ in range(64):
            head.add_(start.abs() * 2**-10)  # a bfloat16 has 8 bits
    assert torch.allclose(head, start + start.abs() / 16, rtol=1e-5)


@HALVES
def test_a_head_of_a_task(dtype: torch.dtype, tmp_path: Path) -> None:
    def bert() -> Any:
        torch.manual_seed(0)
        sizes = dict(vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        return BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).to(dtype).eval()

    model = get_peft_model(bert(), lora(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"]))
    move(model)
    assert {p.dtype for p in trained(model).values()} == {torch.float32} and len(trained(model)) == 6
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(logits(again), logits(model)) and logits(model).dtype == dtype
    import peft

    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path))
    assert (logits(theirs) - logits(model)).abs().max() < 16 * torch.finfo(dtype).eps * logits(model).abs().max()


@HALVES
def test_a_trained_head_in_the_packed_engine(dtype: torch.dtype) -> None:
    model = get_peft_model(base("whole ends", dtype), lora(**CASES["whole ends"]))
    move(model, size=0.02)
    rows = [[5, 9, 4, 7, 11], [3, 8, 6, 10]]
    laid = pack([Example(t, [True] * len(t), "", i) for i, t in enumerate(rows)])
    engine = Engine(model)
    with engine.running(training=True):
        engine.forward(model, laid).loss.backward()
    packed = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    for t in rows:
        (model(input_ids=torch.tensor([t]), labels=torch.tensor([t])).loss * (len(t) - 1)).backward()
    for name, p in trained(model).items():
        assert packed[name].dtype == torch.float32
        assert (packed[name] - p.grad).norm() < 32 * torch.finfo(dtype).eps * p.grad.norm(), name


def test_asked_not_to_it_keeps_the_dtype_of_the_base() -> None:
    options = CASES["whole ends"]
    model = get_peft_model(base("whole ends", torch.bfloat16), lora(**options), autocast_adapter_dtype=False)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}


def test_a_recurrent_module_keeps_the_dtype_of_the_base() -> None:
    """torch reads its weights from a list of its own."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.rnn = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(self.inner(x))[0]

    model = get_peft_model(Tagger().bfloat16(), lora(task_type=None, target_modules=["inner"], modules_to_save=["rnn"]))
    model(torch.ones(1, 3, 4, dtype=torch.bfloat16)).sum().backward()
    assert {p.dtype for n, p in trained(model).items() if "copy" in n} == {torch.bfloat16}
    assert all(p.grad is not None for p in trained(model).values())

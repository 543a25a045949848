"""Experts that are one tensor and no layers: passed by, that is said with the fix; asked for, they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from situations import IDS, lora, move

from trimtab import PeftModel, get_peft_model
from trimtab.errors import NoMatch, TrimtabWarning

SIZES: dict[str, Any] = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
)  # fmt: skip
SLABS = ["experts.gate_up_proj", "experts.down_proj"]


def shared() -> Any:
    torch.manual_seed(0)
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=8)).eval()


def fused() -> Any:
    torch.manual_seed(0)
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES)).eval()


PASSING = [(shared, "all-linear"), (fused, "all-linear"), (shared, ["q_proj", "gate_proj"])]


@pytest.mark.parametrize(("make", "targets"), PASSING)
def test_experts_that_are_passed_by_are_named_with_the_fix(make: Any, targets: Any) -> None:
    with pytest.warns(TrimtabWarning, match=r"frozen .* experts\.gate_up_proj \(2\), experts\.down_proj \(2\)") as said:
        get_peft_model(make(), lora(target_modules=targets))
    assert f"target_parameters={SLABS}" in str(said[0].message)


def test_who_asks_for_attention_alone_is_not_told() -> None:
    get_peft_model(shared(), lora())


def test_a_name_that_no_layer_has_is_an_error() -> None:
    with pytest.raises(NoMatch, match="no module matches target 'gate_proj'"):
        get_peft_model(fused(), lora(target_modules=["q_proj", "gate_proj"]))


@pytest.mark.parametrize("make", [fused, shared])
def test_asked_for_they_are_trained_and_come_back(make: Any, tmp_path: Path) -> None:
    model = get_peft_model(make(), lora(target_modules=["q_proj"], target_parameters=SLABS))
    move(model, size=0.5)
    ids = IDS.repeat(1, 3)
    model(input_ids=ids, labels=ids).loss.backward()
    experts = {n: p for n, p in model.named_parameters() if p.requires_grad and ".experts." in n}
    assert len({n.partition(".adapters")[0] for n in experts}) == 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in experts.values())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)

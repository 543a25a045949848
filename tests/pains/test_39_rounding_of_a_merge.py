"""A merge into 16 bit is the exact sum rounded once; the dtype stays, and unmerging gives the original bytes."""

from __future__ import annotations

import pytest
import torch
from situations import llama, lora, move

from trimtab import get_peft_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_within_one_rounding_of_float64(dtype: torch.dtype) -> None:
    base = llama().to(dtype)
    layer = base.model.layers[0].self_attn.q_proj
    w = layer.weight.detach().clone()
    model = get_peft_model(base, lora(r=4, lora_alpha=8))
    move(model)
    adapter = base.model.layers[0].self_attn.q_proj.adapters["default"]
    exact = w.double() + 2 * adapter.lora_B.weight.detach().double() @ adapter.lora_A.weight.detach().double()
    model.merge_adapter()
    merged = base.model.layers[0].self_attn.q_proj.base_layer.weight.detach()
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    step = eps * exact.abs().clamp(min=least)
    assert merged.dtype == dtype and ((merged.double() - exact).abs() <= 0.51 * step).all()
    model.unmerge_adapter()
    assert torch.equal(base.model.layers[0].self_attn.q_proj.base_layer.weight.view(torch.int16), w.view(torch.int16))
    assert model.merge_and_unload().model.layers[0].self_attn.q_proj.weight.dtype == dtype

"""Packed rows do not see each other, whatever the attention that the model was loaded with."""

from __future__ import annotations

import pytest
import torch
from situations import tiny

from trimtab.data.pack import pack
from trimtab.engine.forward import engine_for


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_each_row_alone(attention: str) -> None:
    rows = [r for r in tiny.rows(12) if len(r.input_ids) in (6, 11, 15, 20, 23)][:3] or tiny.rows(3)
    assert len({len(r.input_ids) for r in rows}) > 1
    one, packed = tiny.adapted(), tiny.adapted()
    for model in (one, packed):
        model.get_base_model().set_attn_implementation(attention)
        with torch.no_grad():
            for i, p in enumerate(tiny.tensors(model).values()):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    want = tiny.one_by_one(one, rows)
    want.backward()
    engine, why = engine_for(packed)
    assert engine is not None, why
    with engine.running():
        loss = engine.forward(packed, pack(rows)).loss / sum(sum(r.supervised[1:]) for r in rows)
        loss.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    for p, q in zip(tiny.tensors(one).values(), tiny.tensors(packed).values(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-5)

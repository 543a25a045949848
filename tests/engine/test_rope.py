"""Models whose positions depend on the longest row of a pass: a long row changes no other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import small_models as small
import torch

from trimtab import evaluate
from trimtab.core.config import config_for
from trimtab.data import Example, collate
from trimtab.engine.forward import Engine
from trimtab.engine.rope import changes_at
from trimtab.errors import ConfigError
from trimtab.model import get_peft_model
from trimtab.train.objectives.sft import row_losses
from trimtab.train.packing import Packing

AT = 64
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 3.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": AT, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": AT}),
}


def model_of(name: str) -> Any:
    kind, over = MODELS[name]
    config = config_for("lora", task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    return small.moved(get_peft_model(small.bare(kind, **over), config))


def rows() -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    made = [small.example(torch.randint(3, 97, (n,), generator=draw).tolist(), line=n) for n in (20, 90, AT, AT + 1, 31)]
    made[1].supervised[-9:] = [False] * 9  # what nobody looks at makes a row long, too
    return made


def loss_and_gradients(model: Any, examples: list[Example], most: int | None) -> small.Found:
    packing, total = Packing(Engine(model), rows=most), 0.0
    with packing.engine.running():
        for p in packing.packs(examples):
            result = packing.engine.forward(model, p)
            result.loss.backward()
            total += result.loss.item()
    return total, small.gradients(model)


@pytest.mark.parametrize("most", [None, 2])
def test_a_long_row_has_a_pass_of_its_own(most: int | None) -> None:
    model, examples = model_of("longrope"), rows()
    assert changes_at(model.config) == AT
    small.same(loss_and_gradients(model, examples, most), small.alone(model, examples), 1e-10)
    found = Packing(Engine(model), rows=most).packs(examples)
    assert sorted(m for p in found for m in p.members) == [0, 1, 2, 3, 4] and {(1,), (3,)} <= {p.members for p in found}


def test_padded_batches_that_would_mix_them_are_refused() -> None:
    model, examples = model_of("longrope"), rows()
    with pytest.raises(ConfigError, match=f"a row has 90 tokens, and beyond {AT} .* micro_batch_size 1, or max_length {AT}"):
        row_losses(model, collate(examples, small.PAD), sparse=True)
    apart = [row_losses(model, collate([e], small.PAD), sparse=True).item() for e in examples]
    tokens = sum(sum(e.supervised[1:]) for e in examples)
    assert math.isclose(evaluate.loss(model, examples, pad_token_id=small.PAD), sum(apart) / tokens, rel_tol=1e-6)


def test_frequencies_that_grow_with_the_row_are_for_short_rows() -> None:
    model, examples = model_of("dynamic"), rows()
    with pytest.raises(ConfigError, match=f"a row has 90 tokens.* and of those before. Fix: max_length {AT}"):
        loss_and_gradients(model, examples, None)
    with pytest.raises(ConfigError, match=f"Fix: max_length {AT}"):
        row_losses(model, collate(examples[1:2], small.PAD), sparse=True)
    short = [e for e in examples if len(e.input_ids) <= AT]
    small.same(loss_and_gradients(model, short, None), small.alone(model, short), 1e-10)


def test_other_models_have_no_such_length() -> None:
    assert changes_at(small.bare("llama").config) is None and changes_at(None) is None
    scaled = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    assert changes_at(small.bare("llama", **scaled).config) is None

"""The same loss and the same gradients however examples are laid out, for every kind of model; or a line that refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import small_models as small
import torch
from small_models import EXACT, Found, alone, packed, padded, same

from trimtab.data import Example
from trimtab.data.pack import Segment, pack, packs
from trimtab.engine.forward import Engine, _even, engine_for
from trimtab.engine.layout import Layout

TO_NORMS = [
    "llama", "qwen2", "qwen3", "mistral", "mistral window", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "cohere2",
    "granite", "gpt_oss", "glm", "smollm3", "deepseek_v3", "qwen2_moe window",
]  # fmt: skip
REFUSED = {
    "gpt2": "its attention drops out 0.1 of the weights in training",
    "bloom": "its attention cannot be told to read a layout",
    "mamba": "0 of its 2 layers read the layout",
    "stablelm": "the layout does not reach the attention layers of this model",
    "llama4": "its attention is confined to chunks of 512 tokens",
}


# ---- every kind of model


@pytest.mark.parametrize("kind", [*EXACT, *TO_NORMS])
def test_packed_equals_one_by_one(kind: str) -> None:
    model, examples = small.adapted(kind), small.rows()
    assert sum(len(p.input_ids) for p in packs(examples, 150)) < 0.8 * sum(len(e.input_ids) for e in examples)
    same(packed(model, examples, 150), alone(model, examples), 1e-12 if kind in EXACT else 2e-6)


@pytest.mark.parametrize("kind", [*EXACT, *TO_NORMS])
def test_packed_equals_one_by_one_in_float32(kind: str) -> None:
    model, examples = small.adapted(kind, dtype=torch.float32), small.rows()
    same(packed(model, examples), alone(model, examples), 1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_laid_out_is_refused_with_the_reason(kind: str) -> None:
    engine, why = engine_for(small.bare(kind))
    assert engine is None and why == f"padded batches: {REFUSED[kind]}"


def test_every_kind_is_one_or_the_other() -> None:
    assert sorted([*EXACT, *TO_NORMS, *REFUSED]) == sorted(small.KINDS)


# ---- every layout of the same examples


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def wanted(request: pytest.FixtureRequest) -> tuple[Any, list[Example], Found, float]:
    """A model whose own rounding is its dtype's, examples, their loss and gradients, and the tolerance."""
    model, examples = small.adapted("phi", dtype=request.param), small.rows()
    return model, examples, alone(model, examples), 1e-12 if request.param is torch.float64 else 1e-4


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 130, 10**6])  # each example by itself ... all in one
def test_any_split_with_or_without_sharing(wanted: Any, budget: int, share: bool) -> None:
    model, examples, found, tolerance = wanted
    same(packed(model, examples, budget, share=share), found, tolerance)


@pytest.mark.parametrize("pad", [small.PAD, small.EOS])  # answers end with the pad token, and rows hold eos
def test_the_padded_path_equals_packs(wanted: Any, pad: int) -> None:
    model, examples, found, tolerance = wanted
    same(padded(model, examples, pad), found, max(tolerance, 1e-6))  # it takes its losses in float32


def test_an_answer_that_ends_with_the_token_that_pads(wanted: Any) -> None:
    model, _, _, tolerance = wanted
    examples = [small.example([5, 6, 7, small.EOS], [False, False, True, True]), small.example([8, 9, 9, 9, 9, small.EOS])]
    found = alone(model, examples)
    assert packs(examples, 100)[0].supervised == 7
    same(packed(model, examples), found, tolerance)
    same(padded(model, examples, small.EOS), found, max(tolerance, 1e-6))


STEM = list(range(3, 40))
HARD: dict[str, list[Example]] = {
    "identical": [small.example([*STEM, 5, 6])] * 3,
    "prefixes": [small.example(STEM), small.example([*STEM, 5]), small.example([*STEM, 5, *STEM]), small.example([*STEM, 5])],
    "partly supervised": [
        small.example([*STEM, 5], [False] * 37 + [True]),
        small.example([*STEM, 6], [True] * 38),
        small.example([*STEM, 6], [k % 2 == 0 for k in range(38)]),
    ],
    "of one token and none supervised": [small.example([7]), small.example([*STEM, 9], [False] * 37 + [True]),
                                         small.example([*STEM, 8], [False] * 38)],
}  # fmt: skip


@pytest.mark.parametrize("case", HARD)
def test_hard_steps(wanted: Any, case: str) -> None:
    model, _, _, tolerance = wanted
    found = alone(model, HARD[case])
    for share in (True, False):
        same(packed(model, HARD[case], share=share), found, tolerance)


def test_the_loss_of_each_example() -> None:
    model, examples = small.adapted("phi"), small.rows()
    engine = Engine(model)
    p = pack(examples)
    with torch.no_grad():
        wanted = [small.one_by_one(model, [examples[i]]).item() for i in p.members]
        with engine.running():
            rows = engine.forward(model, p).rows
    assert rows.tolist() == pytest.approx(wanted, rel=1e-12)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, examples = small.adapted("phi"), small.rows()
    found = alone(model, examples)
    again: list[int] = []
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().model.layers[0].self_attn.register_forward_hook(lambda *_: again.append(1))
    same(packed(model, examples, 150), found, 1e-12)
    passes = len(packs(examples, 150))
    assert len(again) >= 2 * passes + 2, "layers were not computed again"


@pytest.mark.parametrize("method", ["dora", "ia3", "oft", "vera"])
def test_other_methods(method: str) -> None:
    options = {"ia3": {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]}, "oft": {"oft_block_size": 4}}
    given = {"target_modules": ["q_proj", "v_proj", "fc1"]} | options.get(method, {})
    model, examples = small.with_method(small.bare("phi"), method, **given), small.rows()
    same(packed(model, examples, 150), alone(model, examples), 1e-12)


# ---- low precision


@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_bfloat16(kind: str) -> None:
    model, exact, examples = small.adapted(kind, dtype=torch.bfloat16), small.adapted(kind), small.rows()
    found, wanted = packed(model, examples, 150), alone(exact, examples)
    assert found[0] == pytest.approx(wanted[0], rel=0.02)
    theirs = alone(model, examples)
    for name, g in wanted[1].items():  # as near to the truth as one example at a time is in this dtype
        error = [(x[1][name].double() - g).norm() / g.norm() for x in (found, theirs)]
        assert error[0] < max(1.5 * error[1], 0.05), name


@pytest.mark.parametrize("loss", ["inside", "outside"])
@pytest.mark.parametrize("how", ["frozen", "trained", "soft cap"])
def test_autocast(how: str, loss: str) -> None:
    """A float32 model under bfloat16 autocast, as trainers run it; the loss may be taken in or after it."""
    model = small.adapted("gemma2" if how == "soft cap" else "llama", dtype=torch.float32,
                          **({"modules_to_save": ["lm_head"]} if how == "trained" else {}))  # fmt: skip
    examples = small.rows()
    wanted = alone(model, examples)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = alone(model, examples)
    engine = Engine(model)
    inner, low = model.get_base_model().forward, torch.autocast("cpu", torch.bfloat16)
    try:
        if loss == "outside":
            model.get_base_model().forward = low(inner)
        with engine.running():
            with low if loss == "inside" else torch.enable_grad():
                result = engine.forward(model, pack(examples))
            result.loss.backward()
    finally:
        model.get_base_model().forward = inner
    assert result.loss.item() == pytest.approx(wanted[0], rel=0.02)
    for name, g in small.gradients(model).items():
        error = [(x - wanted[1][name]).norm() / wanted[1][name].norm() for x in (g, theirs[1][name])]
        assert error[0] < max(1.5 * error[1], 0.05), name


# ---- shapes


def test_what_fills_a_row_up_has_a_position_that_the_model_has() -> None:
    """OPT has a table of 256 positions; a row of 60 and 256 tokens is filled up from 315 to 320."""
    model = small.adapted("opt")
    examples = [small.example([3 + (7 * k + n) % 90 for k in range(n)]) for n in (60, 256)]
    assert len(_even(pack(examples)).input_ids) > len(pack(examples).input_ids)
    small.same(small.packed(model, examples), small.alone(model, examples), 1e-10)


def test_lengths_of_rows_and_blocks_recur() -> None:
    """A CPU makes code for each shape: a row has one of 16 lengths an octave, and is filled up by a sixteenth at most."""
    found = [len(_even(pack([small.example(range(3, n + 4))])).input_ids) for n in range(1, 2049)]
    assert len(set(found)) <= 16 * 8 and all(n % 8 == 0 for n in found)
    assert all(have <= n + max(8, n / 16) and have >= n for n, have in enumerate(found, 1))
    blocks = [b for n in range(1, 129) for b in Layout([Segment(0, n, -1, 0)]).blocks()]
    assert {b.length for b in blocks} == set(range(8, 129, 8))

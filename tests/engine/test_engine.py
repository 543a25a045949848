"""The same loss and the same gradients however examples are laid out, for every kind of model; or a line that refuses it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small_models as small
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.data import Example, collate
from trimtab.data.pack import pack, packs
from trimtab.engine import forward, head
from trimtab.engine.attention import NAME
from trimtab.engine.forward import Engine, engine_for
from trimtab.errors import NotSupported
from trimtab.train.objectives.sft import row_losses

# root mean square norms are computed in float32 by transformers, whatever the model's dtype: what is summed in another
# order there differs by that rounding
EXACT = ["phi", "gpt_neox", "gpt2 no dropout", "opt"]
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

Found = tuple[float, dict[str, Tensor]]


def alone(model: Any, examples: list[Example]) -> Found:
    loss = small.one_by_one(model, examples)
    loss.backward()
    return loss.item(), small.gradients(model)


def packed(model: Any, examples: list[Example], budget: int = 10**6, *, share: bool = True) -> Found:
    engine, total = Engine(model), 0.0
    rows = torch.zeros(len(examples), dtype=torch.float64)
    with engine.running():
        for p in packs(examples, budget, share=share):
            result = engine.forward(model, p)
            result.loss.backward()
            total += result.loss.item()
            rows[list(p.members)] = result.rows.double()
    assert total == pytest.approx(float(rows.sum()), rel=1e-5)
    return total, small.gradients(model)


def padded(model: Any, examples: list[Example], pad: int) -> Found:
    losses = row_losses(model, collate(examples, pad), sparse=True)
    losses.sum().backward()
    return losses.sum().item(), small.gradients(model)


def same(found: Found, wanted: Found, tolerance: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, g in wanted[1].items():
        largest = g.abs().max()
        assert largest > 0, name
        assert (found[1][name] - g).abs().max() <= tolerance * largest, name


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


def twice(examples: list[Example]) -> list[Example]:
    return [e for e in examples for _ in range(2)]


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


# ---- the loss


def test_the_step_is_not_computed_in_vain() -> None:
    """Logits are made where something is supervised, and once for the first token alone."""
    model, examples = small.adapted("phi"), small.rows()
    engine, p = Engine(model), pack(examples)
    with Shapes() as seen, engine.running():
        engine.forward(model, p).loss.backward()
    rows = [shape[-2] for shape in seen.made if len(shape) > 1 and shape[-1] == small.VOCABULARY]
    assert max(rows) == len(p.kept) < len(p.input_ids)


class Shapes(TorchDispatchMode):
    """The shape of every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [x.shape for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        return out


@pytest.mark.parametrize("kind", ["phi", "gemma2"])  # a frozen head by itself, and one with a soft cap behind it
@pytest.mark.parametrize("trained", [False, True])
def test_memory_of_the_loss_does_not_grow_with_the_rows(kind: str, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, chunk = 3000, 40
    monkeypatch.setattr(head, "CHUNK", chunk * vocabulary)
    more = {"modules_to_save": ["lm_head"]} if trained else {}
    model = small.adapted(kind, over={"vocab_size": vocabulary}, **more)
    engine, p = Engine(model), pack([small.example([k % 90 for k in range(3, 203)])])
    with Shapes() as seen, engine.running():
        engine.forward(model, p).loss.backward()
    logits = [shape for shape in seen.made if shape[-1:] == (vocabulary,)]
    assert max(shape.numel() for shape in logits) == chunk * vocabulary
    largest = max(shape.numel() for shape in seen.made)
    assert largest == chunk * vocabulary  # the head's own weight is smaller, and so is all else


@pytest.mark.parametrize("chunk", [1, 16 * 97, 1 << 22])
@pytest.mark.parametrize("kind", ["phi", "gemma2", "cohere2", "granite", "gpt2 no dropout"])
@pytest.mark.parametrize("how", ["frozen", "trained", "adapted", "adapted with dropout off"])
def test_heads(kind: str, how: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft caps, logit scales, tied embeddings; a head that is frozen, trained itself, or adapted."""
    monkeypatch.setattr(head, "CHUNK", chunk)
    more: dict[str, Any] = {}
    if how == "trained":
        more = {"modules_to_save": ["lm_head"]}
    elif how != "frozen":
        more = {"target_modules": r".*\.layers\.\d+\..*(q_proj|v_proj)|.*c_attn|lm_head"}
    if how == "adapted with dropout off":
        more["lora_dropout"] = 0.5
    model, examples = small.adapted(kind, **more), small.rows()
    model.train(how != "adapted with dropout off")
    assert any("lm_head" in name for name in small.tensors(model)) == (how != "frozen")
    same(packed(model, examples, 150), alone(model, examples), 1e-12 if kind in EXACT else 2e-6)


@pytest.mark.parametrize("how", ["frozen", "trained", "tokens"])
def test_tied_embeddings(how: str) -> None:
    more: dict[str, Any] = {"trained": {"modules_to_save": ["lm_head"]}, "tokens": {"modules_to_save": ["embed_in"]}}
    model = small.adapted("gpt_neox", over={"tie_word_embeddings": True}, **more.get(how, {}))
    inner = model.get_base_model()
    if how == "frozen":
        assert inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    same(packed(model, small.rows(), 150), alone(model, small.rows()), 1e-12)


@pytest.mark.parametrize("kind", ["gemma2", "cohere2", "granite"])
def test_what_a_model_does_behind_its_head_is_found_where_logits_are_small(kind: str) -> None:
    """A soft cap of 30 on logits of 0.01 is nearly nothing, and must be there all the same when they grow."""
    over = {"final_logit_softcapping": 30.0} if kind == "gemma2" else {}
    model = small.bare(kind, over=(), **over)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-4)
    engine = Engine(model)
    assert engine.after is not None
    wide = torch.linspace(-100, 100, 11, dtype=torch.float64)
    factor = {"cohere2": 0.25, "granite": 0.25}
    expected = 30 * torch.tanh(wide / 30) if kind == "gemma2" else wide * factor[kind]
    assert torch.allclose(engine.after(wide), expected)


@pytest.mark.parametrize("how", ["frozen", "trained"])
def test_a_pack_without_loss_has_zero_gradients(how: str) -> None:
    model = small.adapted("phi", **({"modules_to_save": ["lm_head"]} if how == "trained" else {}))
    engine = Engine(model)
    with engine.running():
        result = engine.forward(model, pack([small.example([5, 6, 7], [True, False, False])]))
        result.loss.backward()
    assert result.loss.item() == 0 and result.rows.tolist() == [0]
    assert all(not g.any() for g in small.gradients(model).values())


def test_a_second_backward_is_an_error() -> None:
    model = small.adapted("phi")
    engine = Engine(model)
    with engine.running():
        loss = engine.forward(model, pack(small.rows())).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="not kept for a second time"):
            loss.backward()


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


# ---- the model stays as it was


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that an engine could leave behind."""
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]
    return {
        "attention": model.config._attn_implementation,
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
        "forwards": [name for name, m in model.named_modules() if "forward" in m.__dict__],
        "tensors": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": [p.grad for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("random"), after.pop("random"))
    theirs = after.pop("tensors")
    assert all(torch.equal(p, theirs[name]) for name, p in before.pop("tensors").items())
    assert before == after


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "bloom", "mamba", "stablelm", "llama4"])
def test_trying_a_model_leaves_it_as_it_was(kind: str) -> None:
    targets = r".*(q_proj|c_attn|query_key_value|in_proj)"
    model = small.with_method(small.bare(kind, dtype=torch.float32), "lora", target_modules=targets)
    for name, p in small.tensors(model).items():
        if "lora_B" in name:
            p.data.zero_()  # a new adapter
    base = model.get_base_model()
    base.eval()
    next(base.children()).train()  # modes that are mixed
    before = state(base)
    engine_for(base)
    unchanged(before, state(base))


def test_a_step_leaves_the_model_as_it_was_also_when_it_fails() -> None:
    model = small.adapted("llama")
    base, p = model.get_base_model(), pack(small.rows())
    engine = Engine(model)
    before = state(base)
    with torch.no_grad():
        with engine.running():
            assert base.config._attn_implementation == NAME
            engine.forward(model, p)
        unchanged(dict(before), state(base))
        with pytest.raises(ZeroDivisionError), engine.running():
            engine.forward(model, p)
            raise ZeroDivisionError
        unchanged(dict(before), state(base))
        with pytest.raises(ZeroDivisionError), engine.running(), failing(base.model.layers[1]):
            engine.forward(model, p)
    unchanged(dict(before), state(base))


class failing:
    """The layer raises inside."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        self.handle = self.layer.register_forward_pre_hook(fail)

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


@pytest.mark.parametrize("fails", [False, True])
def test_layouts_are_freed_with_their_step(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.adapted("llama")
    engine = Engine(model)
    made: list[weakref.ref[Any]] = []
    real = forward.Layout

    def noted(*args: Any) -> Any:
        layout = real(*args)
        made.append(weakref.ref(layout))
        return layout

    monkeypatch.setattr(forward, "Layout", noted)
    try:
        with engine.running():
            engine.forward(model, pack(small.rows())).loss.backward()
            assert made[0]() is not None, "recomputed layers read it by its number"
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_the_models_own_forward_is_untouched_by_an_engine() -> None:
    model, batch = small.adapted("llama"), {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        before = model(**batch).logits
        Engine(model)
        assert torch.equal(model(**batch).logits, before)


# ---- what is refused


def refused(model: Any) -> str:
    engine, why = engine_for(model)
    assert engine is None
    return why


def test_prompt_methods() -> None:
    for method in ("prompt_tuning", "prefix_tuning"):
        model = small.with_method(small.bare("llama"), method, num_virtual_tokens=4)
        assert refused(model) == "padded batches: adapter 'default' puts virtual tokens before each row"
        assert refused(model.get_base_model()) == refused(model)


def test_a_mask_that_the_layout_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.bare("llama")
    layer: Any = model.model.layers[1].self_attn
    layer.is_causal = False
    assert "its attention is not causal" in refused(model)
    layer.is_causal = True
    monkeypatch.setattr(layer, "forward", with_keyword(layer.forward, "position_bias", 1))
    assert "its attention takes position_bias" in refused(model)


def with_keyword(call: Callable[..., Any], name: str, value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(*args, **kwargs, **{name: value})


def test_a_layer_that_attends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.bare("llama")
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states.cumsum(1), None))
    assert "1 of its 2 layers read the layout" in refused(model)


def test_positions_that_do_not_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.bare("llama")
    rope = model.model.rotary_emb

    def counted(x: Tensor, position_ids: Tensor) -> Any:
        return type(rope).forward(rope, x, torch.arange(x.shape[1])[None])

    monkeypatch.setattr(rope, "forward", counted)
    assert "of their spread when rows are packed" in refused(model)


def test_what_happens_behind_the_head_is_not_guessed() -> None:
    model = small.bare("llama")
    model.register_forward_hook(lambda module, args, out: type(out)(logits=out.logits * 1.01))
    assert "it changes its logits behind the output layer in a way that is not known" in refused(model)


def test_an_adapter_that_looks_at_the_whole_row() -> None:
    """A new adapter adds zero: what it will do with a row shows only when it does not."""
    model = small.adapted("phi", target_modules=["fc1"])
    for _, group in model.get_base_model().trimtab_groups["default"].sites():
        group.lora_B.weight.data.zero_()
        group.lora_A.register_forward_pre_hook(lambda module, args: None)
        group.forward = averaged(group)
    assert "of their spread when rows are packed" in refused(model)


def averaged(adapter: Any) -> Callable[..., Tensor]:
    """Adds what the mean token gives to every token."""
    return lambda x, base: base(x) + (x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T).mean(1, keepdim=True)


def test_memory_that_runs_out_while_a_model_is_tried_is_not_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.bare("llama")

    def full(*_: Any) -> Iterator[None]:
        raise torch.OutOfMemoryError("full")

    model.model.layers[0].register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        engine_for(model)


def test_a_model_without_a_head() -> None:
    with pytest.raises(NotSupported, match="no output layer"):
        Engine(small.bare("llama").model)

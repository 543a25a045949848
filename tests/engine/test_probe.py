"""Trying a model leaves it as it was, and so does a step; what cannot be right is refused with the reason."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small_models as small
import torch
from torch import Tensor, nn

from trimtab.data.pack import pack
from trimtab.engine import forward
from trimtab.engine.attention import NAME
from trimtab.engine.forward import Engine, engine_for
from trimtab.errors import NotSupported


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


def test_what_counts_as_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert forward._rounding(single) == forward.EXACT < forward._rounding(half) == forward.ROUNDED
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # products in TF32
    assert forward._rounding(single) == forward.ROUNDED

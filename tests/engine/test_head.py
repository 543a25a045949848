"""The loss without logits: what is made, how much at a time, and every kind of head."""

from __future__ import annotations

from typing import Any

import pytest
import small_models as small
import torch
from small_models import EXACT, alone, packed, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.data.pack import pack
from trimtab.engine import head
from trimtab.engine.forward import Engine


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma2", "cohere2", "granite"])
def test_what_a_model_does_behind_its_head_is_found_where_logits_are_small(kind: str, dtype: torch.dtype) -> None:
    """A soft cap of 30 on logits of 0.01 is nearly nothing, and must be there all the same when they grow."""
    over = {"final_logit_softcapping": 30.0} if kind == "gemma2" else {}
    model = small.bare(kind, dtype=dtype, **over)
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


def test_the_scale_of_a_step_is_not_rounded_to_the_dtype_of_hidden_states() -> None:
    h = torch.randn(6, 16, dtype=torch.bfloat16).requires_grad_()
    linear = nn.Linear(16, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    pairs = head.Pairs(torch.arange(6), torch.arange(6), torch.ones(6))
    whole = torch.autograd.grad(head.losses(h, linear, None, pairs)[0], h)[0]
    third = torch.autograd.grad(head.losses(h, linear, None, pairs)[0] / 3, h)[0]
    assert torch.equal(third, (whole.float() * torch.tensor(1 / 3)).bfloat16())
    assert not torch.equal(third, whole * torch.tensor(1 / 3).bfloat16())

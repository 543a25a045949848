"""Optimizers of low-rank factors against peft's: the same parameters after each of the first steps."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from theirs import base, inputs, quiet_peft
from torch import Tensor, nn

import trimtab
from trimtab import optim
from trimtab.errors import ConfigError
from trimtab.methods.lora import LoRA

FIELDS = dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "embed_tokens"], rank_pattern={"down_proj": 2})


def pair(dtype: torch.dtype, **more: Any) -> tuple[Any, Any]:
    """Ours and theirs on the same numbers."""
    fields = FIELDS | {"task_type": "CAUSAL_LM"} | more
    mine = trimtab.get_peft_model(base("llama").to(dtype), trimtab.LoraConfig(**fields))
    yours = quiet_peft(base("llama").to(dtype), peft.LoraConfig(**fields))
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in mine.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    peft.set_peft_model_state_dict(yours, trimtab.get_peft_model_state_dict(mine))
    return mine, yours


def tensors(model: Any) -> dict[str, Tensor]:
    library = trimtab if isinstance(model, trimtab.PeftModel) else peft
    return {k: v.detach().clone() for k, v in library.get_peft_model_state_dict(model).items()}


def steps(model: nn.Module, optimizer: Any, count: int = 3) -> list[dict[str, Tensor]]:
    seen = []
    for _ in range(count):
        batch = inputs("llama")
        model.eval()(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(tensors(model))
    return seen


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]], bound: float) -> None:
    for mine, yours in zip(a, b, strict=True):
        lora = {k: v for k, v in yours.items() if "lora_" in k}
        assert mine.keys() == lora.keys() and len(mine) == 10
        for key, value in mine.items():
            assert (value - lora[key]).abs().max() <= bound, key
    assert max((a[-1][k] - a[0][k]).abs().max() for k in a[0]) > 1e-3


DTYPES = pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["f64", "f32"])


@DTYPES
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_loraplus(dtype: torch.dtype, bound: float, cls: Any) -> None:
    mine, yours = pair(dtype)
    options: dict[str, Any] = dict(
        lr=1e-2, loraplus_lr_ratio=4.0, loraplus_lr_embedding=1e-3, loraplus_weight_decay=0.1
    )
    ours = optim.create_loraplus_optimizer(mine, cls, **options)
    theirs = create_loraplus_optimizer(yours, cls, **options)
    shown = [[(g["lr"], g["weight_decay"], len(g["params"])) for g in o.param_groups] for o in (ours, theirs)]
    assert shown[0] == shown[1] == [(1e-2, 0.1, 4), (1e-3, 0.1, 2), (4e-2, 0.1, 4), (4e-2, 0.0, 0)]
    same(steps(mine, ours), steps(yours, theirs), bound)


@DTYPES
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_riemannian(dtype: torch.dtype, bound: float, cls: Any) -> None:
    mine, yours = pair(dtype, target_modules=["q_proj", "down_proj", "o_proj"])
    options: dict[str, Any] = dict(lr=1e-2, reg=0.02, weight_decay=0.1)
    ours = optim.create_riemannian_optimizer(mine, cls, **options)
    theirs = create_riemannian_optimizer(yours, cls, **options)
    a, b = steps(mine, ours), steps(yours, theirs)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and all((v - y[k]).abs().max() <= bound for k, v in x.items())


@DTYPES
@pytest.mark.parametrize("rslora", [False, True])
def test_lorafa(dtype: torch.dtype, bound: float, rslora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # it rounds to bfloat16 otherwise
    targets = ["q_proj", "down_proj", "v_proj"]
    mine, yours = pair(dtype, target_modules=targets, use_rslora=rslora, rank_pattern={"down_proj": 2})
    ours = optim.create_lorafa_optimizer(mine, 4, 6, 1e-3, weight_decay=0.1)
    theirs = create_lorafa_optimizer(yours, 4, 6, 1e-3, weight_decay=0.1)
    start = tensors(mine)
    a, b = steps(mine, ours), steps(yours, theirs)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and all((v - y[k]).abs().max() <= max(bound, 1e-6) for k, v in x.items())
    assert all(torch.equal(start[k], v) == ("lora_A" in k) for k, v in a[-1].items())


def test_lorafa_rounds_to_bfloat16_there_and_not_here() -> None:
    mine, yours = pair(torch.float32, target_modules=["q_proj"], rank_pattern={})
    ours, theirs = optim.create_lorafa_optimizer(mine, 4, 6, 1e-3), create_lorafa_optimizer(yours, 4, 6, 1e-3)
    batch = inputs("llama")
    mine.eval()(**batch, labels=batch["input_ids"]).loss.backward()
    yours.eval()(**batch, labels=batch["input_ids"]).loss.backward()
    layer = next(m for m in mine.modules() if isinstance(m, LoRA))
    grad = layer.lora_B.weight.grad
    assert grad is not None
    A, g = layer.lora_A.weight.double(), grad.double()
    want = g @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(4).double()) / layer.s**2
    ours.step()
    theirs.step()
    found = ours.state[layer.lora_B.weight]["exp_avg"] / 0.1
    there = next(v for k, v in theirs.state.items() if "layers.0.self_attn.q_proj" in str(k))["exp_avg_B"] / 0.1
    assert (found - want).abs().max() < 1e-4 * want.abs().max() < (there - want).abs().max()


def test_what_they_do_not_take_is_refused() -> None:
    model = trimtab.get_peft_model(base("llama"), trimtab.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="evaluates the loss itself"):
        optim.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1.0)
    made = optim.create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0)
    with pytest.raises(ConfigError, match="closure"):
        made.step(lambda: torch.zeros(()))
    with pytest.raises(ConfigError, match=r"has \{'r': 4, 'lora_alpha': 6\}"):
        optim.create_lorafa_optimizer(model, 8, 6, 1e-3)
    with pytest.raises(ConfigError, match="must be above 0"):
        optim.create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=0)
    other = trimtab.get_peft_model(base("llama"), trimtab.IA3Config())  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="trains no lora_A"):
        optim.create_riemannian_optimizer(other, torch.optim.SGD, lr=1.0)

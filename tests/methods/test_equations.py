"""Each method's equation from its paper, written out by hand on one small layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab import get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import NotSupported

OUT, IN, R = 6, 8, 2


def adapter(method: str, layer: nn.Module | None = None, **fields: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """The adapted layer, its adapter moved off its start, and the frozen W and b in double precision."""
    torch.manual_seed(0)
    made = nn.Sequential(layer or nn.Linear(IN, OUT)).double()
    model = get_peft_model(made, config_for(method, target_modules=["0"], **fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    site: Any = model.get_base_model()[0]
    return site, site.adapters["default"], site.base_layer.weight.detach(), site.base_layer.bias.detach()


def holds(site: Any, w: Tensor, b: Tensor) -> None:
    x = torch.randn(5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (site(x) - (x @ w.T + b)).abs().max() < 1e-12


@pytest.mark.parametrize(("rs", "s"), [(False, 6 / R), (True, 6 / R**0.5)])
def test_lora(rs: bool, s: float) -> None:
    site, a, w, b = adapter("lora", r=R, lora_alpha=6, use_rslora=rs, lora_bias=True)
    holds(site, w + s * a.lora_B.weight @ a.lora_A.weight, b + s * a.lora_B.bias)


def test_dora() -> None:
    site, a, w, b = adapter("dora", r=R, lora_alpha=6)
    v = w + 3 * a.lora.lora_B.weight @ a.lora.lora_A.weight
    m = site.lora_magnitude_vector["default"]
    holds(site, m[:, None] * v / v.norm(dim=1, keepdim=True), b)
    fresh = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config_for("dora", target_modules=["0"], r=R))
    layer: Any = fresh.get_base_model()[0]
    assert torch.allclose(layer.lora_magnitude_vector["default"], layer.base_layer.weight.norm(dim=1))


def test_dora_s_norm_is_a_constant_for_the_gradient() -> None:
    site, a, w, _ = adapter("dora", r=R, lora_alpha=6)
    x, g = torch.randn(5, IN, dtype=torch.float64), torch.randn(5, OUT, dtype=torch.float64)
    (site(x) * g).sum().backward()
    A, B, m = a.lora.lora_A.weight, a.lora.lora_B.weight, site.lora_magnitude_vector["default"]
    scale = (m / (w + 3 * B @ A).norm(dim=1)).detach()[:, None]
    assert torch.allclose(B.grad, 3 * scale * (g.T @ x) @ A.T.detach())
    assert torch.allclose(A.grad, 3 * B.T.detach() @ (scale * (g.T @ x)))


def test_ia3() -> None:
    site, a, w, b = adapter("ia3", feedforward_modules=[])
    holds(site, a.ia3_l * w, a.ia3_l.flatten() * b)
    site, a, w, b = adapter("ia3", feedforward_modules=["0"])
    holds(site, w * a.ia3_l, b)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("terms", [None, 1, 2, 3, 5, 8])
def test_oft(terms: int | None, shared: bool) -> None:
    fields = {"use_cayley_neumann": False} if terms is None else {"num_cayley_neumann_terms": terms}
    site, a, w, b = adapter("oft", oft_block_size=4, block_share=shared, **fields)
    blocks = []
    for v in a.oft_R.weight.detach():
        Q, at = torch.zeros(4, 4, dtype=torch.float64), iter(v)
        for i in range(4):
            for j in range(i + 1, 4):
                Q[i, j] = next(at)
                Q[j, i] = -Q[i, j]
        eye = torch.eye(4, dtype=torch.float64)
        if terms is None:
            blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
        else:  # I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1); two terms: I + 2 Q
            weights = [1.0, *[2.0] * (terms - 2), 1.0 if terms > 2 else 2.0][:terms]
            blocks.append(sum((c * torch.linalg.matrix_power(Q, k) for k, c in enumerate(weights)), torch.zeros(4, 4)))
    rotation = torch.block_diag(*(blocks * 2 if shared else blocks))
    holds(site, w @ rotation.T, b)
    if terms is None:
        assert torch.allclose(rotation @ rotation.T, torch.eye(IN, dtype=torch.float64))


def test_coft_keeps_each_block_near_no_rotation() -> None:
    site, a, _, _ = adapter("oft", oft_block_size=4, coft=True, eps=0.01)
    site(torch.randn(2, IN, dtype=torch.float64))
    norms = 2**0.5 * a.oft_R.weight.norm(dim=1)  # of Q, which holds each number twice
    assert torch.allclose(norms, torch.full_like(norms, 0.01 / 2**0.5))
    before = a.oft_R.weight.clone()
    site(torch.randn(2, IN, dtype=torch.float64))
    assert torch.equal(a.oft_R.weight, before)


def test_vera() -> None:
    site, a, w, b = adapter("vera", r=R, d_initial=0.4)
    A, B = a.shared.vera_A, a.shared.vera_B
    assert A.abs().max() <= (6 / IN) ** 0.5 and B.abs().max() <= (6 / R) ** 0.5 and not A.requires_grad
    holds(site, w + a.vera_lambda_b.diag() @ B @ a.vera_lambda_d.diag() @ A, b)


def test_dropout_acts_in_training_alone_and_only_on_the_product() -> None:
    for method, field in (("lora", "lora_dropout"), ("vera", "vera_dropout")):
        site, _, w, b = adapter(method, r=R, **{field: 1.0})
        holds(site.train(), w, b)  # everything dropped: the base is left
        x = torch.randn(3, IN, dtype=torch.float64)
        assert (site.eval()(x) - (x @ w.T + b)).abs().max() > 1e-3


def test_ranks_that_do_not_divide_and_biases_of_embeddings_are_refused() -> None:
    with pytest.raises(NotSupported, match="no multiple of its 2 groups"):
        adapter("lora", nn.Conv1d(4, 4, 3, groups=2), r=3)
    with pytest.raises(NotSupported, match="is an embedding"):
        adapter("lora", nn.Embedding(4, 4), r=2, lora_bias=True)


def test_a_layer_without_a_bias_is_merged_into_one_that_has_lora_s() -> None:
    cfg = config_for("lora", target_modules=["0"], lora_bias=True)
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=False)), cfg)
    layer: Any = model.get_base_model()[0]  # type: ignore[index]
    with torch.no_grad():
        layer.lora_B["default"].bias.normal_()
    x, s = torch.randn(3, IN), 8 / 8
    y = model(x)
    assert torch.allclose(y, layer.base_layer(x) + s * layer.lora_B["default"].bias)
    model.merge_adapter()
    assert torch.allclose(model(x), y, atol=1e-6) and layer.base_layer.bias is not None
    model.unmerge_adapter()
    assert layer.base_layer.bias is None and torch.equal(model(x), y)

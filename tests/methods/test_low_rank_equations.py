"""The equations of the methods with low-rank and structured updates, written out by hand, and the budgets of those that
have one."""

from __future__ import annotations

import pytest
import torch
from test_equations import IN, OUT, adapter, holds
from torch import nn

from trimtab import get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import ConfigError, NotSupported


def test_hira() -> None:
    site, a, w, b = adapter("hira", r=2)
    delta = torch.zeros_like(w)
    for i in range(OUT):
        for j in range(IN):
            delta[i, j] = w[i, j] * sum(a.hira_B[i, k] * a.hira_A[k, j] for k in range(2))
    holds(site, w + delta, b)


def test_delora() -> None:
    site, a, w, b = adapter("delora", r=2, delora_lambda=5)
    delta = torch.zeros_like(w)
    for i in range(2):
        left, right = a.delora_B[:, i], a.delora_A[i]
        delta += a.delora_lambda / 2 * torch.outer(left / left.norm(), right / right.norm() * w.norm(dim=0))
    holds(site, w + delta, b)
    assert delta.norm() <= a.delora_lambda * w.norm(dim=0).max()  # lambda bounds the update


def test_loha() -> None:
    site, a, w, b = adapter("loha", r=2, alpha=3)
    holds(site, w + 1.5 * (a.hada_w1_a @ a.hada_w1_b) * (a.hada_w2_a @ a.hada_w2_b), b)


@pytest.mark.parametrize(("r", "both"), [(1, False), (1, True), (4, False)])
def test_lokr(r: int, both: bool) -> None:
    site, a, w, b = adapter("lokr", nn.Linear(8, 6).double(), r=r, alpha=3, decompose_both=both)  # in 2 x 4, out 2 x 3
    own = dict(a.named_parameters())
    assert ("lokr_w1" in own, "lokr_w2" in own) == (True, r == 4)
    w1 = own["lokr_w1"]
    w2 = own["lokr_w2"] if r == 4 else own["lokr_w2_a"] @ own["lokr_w2_b"]
    delta = torch.zeros_like(w)
    for l in range(2):
        for m in range(2):
            delta[3 * l : 3 * l + 3, 4 * m : 4 * m + 4] = 3 / r * w1[l, m] * w2
    holds(site, w + delta, b)


def test_lokr_decomposes_the_small_matrix_where_that_saves() -> None:
    _, a, _, _ = adapter("lokr", nn.Linear(36, 36), r=2, decompose_both=True)  # 6 x 6
    assert sorted(n for n, _ in a.named_parameters()) == [f"lokr_w{i}_{side}" for i in "12" for side in "ab"]
    with pytest.raises(ConfigError, match="lycoris"):
        config_for("lokr", init_weights="licoris")


def test_gralora() -> None:
    site, a, w, b = adapter("gralora", r=4, gralora_k=2, hybrid_r=1, alpha=10)
    delta = a.gralora_B_general.weight @ a.gralora_A_general.weight
    for j in range(2):  # outputs
        for n in range(2):  # inputs
            A, B = a.gralora_A[n, :, 2 * j : 2 * j + 2], a.gralora_B[j, 2 * n : 2 * n + 2]
            block = torch.zeros_like(w)
            block[3 * j : 3 * j + 3, 4 * n : 4 * n + 4] = (A @ B).T
            delta = delta + block
    holds(site, w + 2 * delta, b)
    with pytest.raises(NotSupported, match="does not divide"):
        adapter("gralora", nn.Linear(7, 4), r=4)
    with pytest.raises(ConfigError, match="no multiple"):
        config_for("gralora", r=5)


def test_glora() -> None:
    site, a, w, b = adapter("glora", r=2)
    A, B, C = (p["Xd"] @ p["Xu"] for p in (a.glora_A, a.glora_B, a.glora_C))
    holds(site, w + w * A + B, b + b * a.glora_D["X"] + a.glora_E["X"] + (w @ C)[:, 0])
    site, a, w, b = adapter("glora", config_A_B="vector", config_C="vector", config_D_E="vector")
    A, B, C, D, E = (getattr(a, f"glora_{letter}")["X"] for letter in "ABCDE")
    assert (A.shape, B.shape, C.shape, D.shape, E.shape) == ((OUT, 1), (OUT, 1), (IN, 1), (OUT,), (OUT,))
    holds(site, w + w * A + B, b + b * D + E + (w @ C)[:, 0])
    site, a, w, b = adapter("glora", config_A_B="constant", config_C="none", config_D_E="none")
    holds(site, w * (1 + a.glora_A["X"].item()) + a.glora_B["X"].item(), b)


def test_glora_has_no_paths_to_a_bias_that_is_not_there() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=False)), config_for("glora", target_modules=["0"]))
    names = {n.split("default.")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"glora_{letter}.{x}" for letter in "AB" for x in ("Xd", "Xu")}


def test_peanut() -> None:
    site, a, w, b = adapter("peanut", r=3, depth=2, scaling=0.5)
    h0 = (a.peanut_A.weight @ w).clamp(min=0)
    h1 = (a.peanut_encoders[0].weight @ h0).clamp(min=0)
    h2 = (a.peanut_encoders[1].weight @ h1).clamp(min=0)
    h = (a.peanut_decoders[0].weight @ h2).clamp(min=0) + h1
    h = (a.peanut_decoders[1].weight @ h).clamp(min=0) + h0
    holds(site, w + 0.5 * a.peanut_B.weight @ h, b)
    with pytest.raises(ConfigError, match="relu"):
        config_for("peanut", act_fn="reluu")


@pytest.mark.parametrize("para", [False, True])
@pytest.mark.parametrize("decomposition", ["relu", "qr"])
def test_deft(decomposition: str, para: bool) -> None:
    site, a, w, b = adapter("deft", r=2, alpha=3, decomposition_method=decomposition, para=para)
    P = a.deft_P.detach()
    Q = P if decomposition == "relu" else torch.linalg.qr(P).Q
    V = P.clamp(min=0) if decomposition == "relu" else Q
    holds(site, w - Q @ V.T @ w + (0 if para else 1.5 * Q @ a.deft_R), b)
    if para and decomposition == "qr":  # the part is gone
        assert (Q.T @ a.weight(w)).abs().max() < 1e-12


def test_dropout_acts_on_the_update_alone() -> None:
    fields = {"hira": "hira_dropout", "delora": "module_dropout", "gralora": "gralora_dropout"}
    for method, field in fields.items():
        site, _, w, b = adapter(method, r=2, **{field: 1.0})
        holds(site.train(), w, b)
        x = torch.randn(3, IN, dtype=torch.float64)
        assert (site.eval()(x) - (x @ w.T + b)).abs().max() > 1e-3
    site, a, w, b = adapter("deft", r=2, deft_dropout=1.0)  # what is taken out is not given back
    holds(site.train(), w - a.deft_P @ a.deft_P.relu().T @ w, b)


def test_rows_and_whole_updates_are_dropped_in_training_alone() -> None:
    for method in ("loha", "lokr"):
        small = {"loha": {"r": 2}, "lokr": {"r": 1}}[method]
        for field in ("rank_dropout", "module_dropout"):
            site, _, w, b = adapter(method, **small, **{field: 1.0})
            holds(site.train(), w, b)
            x = torch.randn(3, IN, dtype=torch.float64)
            assert (site.eval()(x) - (x @ w.T + b)).abs().max() > 1e-3
        site, a, w, b = adapter(method, **small, rank_dropout=0.5)
        x, change = torch.randn(3, IN, dtype=torch.float64), (a.weight(w) - w).detach()
        torch.manual_seed(1)
        y = (site.train()(x) - (x @ w.T + b)).detach()
        kept = [bool(y[:, i].abs().max() > 1e-9) for i in range(OUT)]
        scale = OUT / sum(kept) if method == "loha" else 1.0
        assert 0 < sum(kept) < OUT  # of six, for this seed
        assert (y - scale * torch.tensor(kept) * (x @ change.T)).abs().max() < 1e-12


def test_strength_and_rank_by_pattern() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        config_for("delora", target_modules=["0", "1"], rank_pattern={"0": 3}, lambda_pattern={"1": 2.5}),
    )
    first, second = (layer.adapters["default"] for layer in model.get_base_model())  # type: ignore[attr-defined]
    assert (len(first.delora_A), len(second.delora_A)) == (3, 8)
    assert (first.delora_lambda.item(), second.delora_lambda.item()) == (15, 2.5)

"""The equations of the methods with low-rank and structured updates, written out by hand, and the budgets of those that
have one."""

from __future__ import annotations

import pytest
import torch
from test_equations import IN, OUT, adapter, holds
from torch import nn

from trimtab import get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import ConfigError


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

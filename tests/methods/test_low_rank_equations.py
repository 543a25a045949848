"""The equations of the methods with low-rank and structured updates, written out by hand, and the budgets of those that
have one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_equations import IN, OUT, adapter, holds
from torch import Tensor, nn

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import config_for
from trimtab.core.group import Group
from trimtab.errors import ConfigError, NotMergeable, NotSupported, TrimtabWarning
from trimtab.methods import _basis
from trimtab.methods._clusters import clusters


def holds_to(bound: float, site: Any, w: Tensor, b: Tensor) -> None:
    x = torch.randn(5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (site(x) - (x @ w.T + b)).abs().max() < bound


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


def two(method: str, **fields: Any) -> list[Any]:
    """The adapters of two layers of one model, in double precision and off their start."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN)).double()
    model = get_peft_model(made, config_for(method, target_modules=["0", "1"], **fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return [layer.adapters["default"] for layer in model.get_base_model()]  # type: ignore[attr-defined]


def test_vblora() -> None:
    site, a, w, b = adapter("vblora", nn.Linear(8, 6), r=2, num_vectors=5, vector_length=2, topk=2)
    bank = a.shared.vblora_vector_bank

    def part(logits: Tensor) -> Tensor:
        (x, y), (i, j) = logits.topk(2)
        return x.exp() / (x.exp() + y.exp()) * bank[i] + y.exp() / (x.exp() + y.exp()) * bank[j]

    A, B = torch.zeros(2, 8, dtype=w.dtype), torch.zeros(6, 2, dtype=w.dtype)
    for r in range(2):
        for t in range(4):
            A[r, 2 * t : 2 * t + 2] = part(a.vblora_logits_A[r, t])
        for t in range(3):
            B[2 * t : 2 * t + 2, r] = part(a.vblora_logits_B[t, r])
    holds(site, w + B @ A, b)
    first, second = two("vblora", num_vectors=4, vector_length=2)
    assert first.shared.vblora_vector_bank is second.shared.vblora_vector_bank
    with pytest.raises(NotSupported, match="does not divide"):
        adapter("vblora", nn.Linear(8, 7), vector_length=2, num_vectors=4)


def test_randlora() -> None:
    for layer, wide in ((nn.Linear(8, 6), True), (nn.Linear(8, 10), False)):
        site, a, w, b = adapter("randlora", layer, r=3, randlora_alpha=6)
        low, high = sorted(w.shape)
        A, B, n = a.shared.randlora_A, a.shared.randlora_B, -(-low // 3)
        assert A.shape == (3, 1, low) and B.shape == (high, n, 3)
        P = torch.stack([a.randlora_lambda[i, j] * A[i, 0] * a.randlora_gamma[j] for i in range(3) for j in range(n)])
        Q = torch.stack([B[:, j, i] for j in range(n) for i in range(3)], dim=1)
        holds(site, w + 2 * ((Q @ P).T if wide else Q @ P), b)
    sparse = adapter("randlora", nn.Linear(40, 40), r=8, sparse=True)[1].shared
    assert len(sparse.randlora_B.unique()) == 3 and 0.6 < (sparse.randlora_B == 0).float().mean() < 0.73


def test_unilora() -> None:
    site, a, w, b = adapter("unilora", r=2, theta_d_length=5)
    theta, (first, second) = a.shared.unilora_theta_d, (a.unilora_indices_A, a.unilora_indices_B)
    taken = torch.cat([first.flatten(), second.flatten()]).tolist()
    counts = [taken.count(k) for k in range(5)]
    assert sum(counts) == 2 * (IN + OUT) and max(counts) - min(counts) <= 1
    A, B = (theta[i] / torch.tensor(counts)[i] ** 0.5 for i in (first, second))
    holds_to(1e-8, site, w + B @ A, b)  # the roots are single precision
    one, other = two("unilora", r=2, theta_d_length=7)
    assert one.shared is other.shared and one.shared.counts.sum() == 4 * (IN + OUT)


def test_tinylora() -> None:
    site, a, w, b = adapter("tinylora", r=2, u=3)
    U, S, V = torch.linalg.svd(w)
    v, P = a.shared.tinylora_v[0], a.tinylora_P
    R = sum(v[i] * P[i] for i in range(3))
    holds(site, w + U[:, :2] @ S[:2].sqrt().diag() @ R @ S[:2].sqrt().diag() @ V[:2], b)


@pytest.mark.parametrize(("tying", "groups"), [(0.0, [0, 1]), (0.5, [0, 0]), (1.0, [0, 0])])
def test_tinylora_s_numbers_are_shared_as_asked(tying: float, groups: list[int]) -> None:
    parts = two("tinylora", r=1, u=3, weight_tying=tying)
    assert [p.group for p in parts] == groups and len(parts[0].shared.tinylora_v) == 1 + max(groups)
    assert not torch.equal(parts[0].tinylora_P, parts[1].tinylora_P)


def test_pvera() -> None:
    site, a, w, b = adapter("pvera", r=2)
    site.eval()
    A, B, d = a.shared.pvera_A[:2], a.shared.pvera_B, a.pvera_lambda_d[:2]
    holds(site, w + a.pvera_lambda_b.diag() @ B @ d.diag() @ A, b)


@pytest.mark.parametrize("seed", [None, 5])
def test_pvera_draws_in_training(seed: int | None) -> None:
    site, a, w, b = adapter("pvera", r=2, generator_seed=seed)
    x = torch.randn(1, IN, dtype=torch.float64).expand(20_000, -1)
    inner, deviation = (x[0] @ (a.pvera_lambda_d[:, None] * a.shared.pvera_A).T).chunk(2)
    B = a.pvera_lambda_b[:, None] * a.shared.pvera_B
    y = site.train()(x).detach() - (x @ w.T + b)
    assert (y.mean(0) - B @ inner).abs().max() < 0.05 * y.std()
    want = B @ (deviation.exp().diag()) @ B.T  # exp(v / 2)^2
    assert (torch.cov(y.T) - want).abs().max() < 0.05 * want.abs().max()
    torch.manual_seed(1)
    first = site(x[:2])
    torch.manual_seed(1)
    assert torch.equal(site(x[:2]), first) and not torch.equal(site(x[:2]), first)


def test_pvera_that_always_draws_cannot_be_merged() -> None:
    fields = {"r": 2, "target_modules": ["0"], "sample_at_inference": True, "init_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config_for("pvera", **fields))
    x = torch.randn(2, 4)
    assert not torch.equal(model.eval()(x), model(x))
    with pytest.raises(NotMergeable, match="draws"):
        model.merge_adapter()


def test_frod() -> None:
    site, a, w, b = adapter("frod", sparse_rate=0.05)
    V, where, l = a.shared.frod_V._buffers["0"], a.shared.frod_s_indices._buffers["0"], a.frod_lambda_l
    columns = torch.linalg.solve(V.double(), w.T).T  # W V^-T
    U = columns / columns.norm(dim=0).clamp(min=1e-12) * (columns.norm(dim=0) > 1e-12)
    S = torch.zeros(IN, IN, dtype=torch.float64)
    for value, (i, j) in zip(a.frod_lambda_s_values, where.T.tolist(), strict=True):
        assert i != j
        S[i, j] = value
    assert len(where.T) == 3
    assert torch.allclose(U @ columns.norm(dim=0).diag() @ V.double().T, w, atol=1e-6)  # what W is made of
    holds_to(1e-6, site, U @ (S + l.diag()) @ V.double().T, b)


def test_frod_shares_a_basis_among_layers_of_a_role() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x))

    torch.manual_seed(0)
    made = nn.Sequential(nn.ModuleList(), Block(), Block(), Block())[1:]
    x = torch.randn(3, 6)
    want = made(x)
    model = get_peft_model(made, config_for("frod", target_modules=["up", "down"]))
    shared = model.get_base_model().trimtab_groups["default"].shared  # type: ignore[union-attr]
    assert {k: tuple(v.shape) for k, v in shared.frod_V._buffers.items()} == {"down": (8, 8), "up": (6, 6)}
    assert (model(x) - want).abs().max() < 1e-5
    with pytest.raises(NotSupported, match="different numbers of inputs"):
        odd = nn.ModuleDict({str(n): nn.ModuleDict({"q": nn.Linear(n, 4)}) for n in (4, 5)})
        get_peft_model(nn.Sequential(odd), config_for("frod", target_modules=["q"]))


@pytest.mark.parametrize(
    ("path", "role", "number"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj", 3),
        ("encoder.layer.11.attention.self.query", "self_query", 11),
        ("encoder.layer.1.attention.output.dense", "attention_output", 1),
        ("encoder.layer.1.output.dense", "output_dense", 1),
        ("0", "0", 0),
        ("blocks.2", "blocks_2", 2),
        ("blocks.2.q", "q", 2),
        ("classifier.dense", "classifier_dense", None),
    ],
)
def test_roles_and_numbers_are_read_off_a_path(path: str, role: str, number: int | None) -> None:
    assert (_basis.role(path), _basis.depth(path)) == (role, number)


def test_lily() -> None:
    site, a, w, b = adapter("lily", r=2, num_B=3, scaling=0.5)
    x = torch.randn(2, 4, IN, dtype=torch.float64)
    h = x @ a.lily_A.weight.T
    p = (h @ a.lily_router.weight.T).softmax(-1).mean((0, 1))
    B = sum(p[e] * a.lily_B.weight[2 * e : 2 * e + 2] for e in range(3))  # (r, out)
    assert (site(x) - (x @ w.T + b + 0.5 * h @ B)).abs().max() < 1e-12
    assert (site(x[:1]) - site(x)[:1]).abs().max() > 1e-6  # a row depends on the rows beside it
    with pytest.raises(NotMergeable, match="depends on its input"):
        a.weight(w)


def test_a_method_that_reads_the_weight_cannot_stand_on_lily() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config_for("lily", r=2, target_modules=["0"]))
    model.add_adapter("after", config_for("hira", r=2, target_modules=["0"]))
    model.set_adapter(["after", "default"])
    model(torch.randn(2, 4))
    model.set_adapter(["default", "after"])
    with pytest.raises(NotMergeable, match="for a method after it to read"):
        model(torch.randn(2, 4))
    with pytest.raises(NotMergeable):
        model.merge_adapter()


def test_adalora() -> None:
    site, a, w, b = adapter("adalora", init_r=3, target_r=2, total_step=9, lora_alpha=6)
    E = a.lora_E[:, 0]
    holds(site, w + 6 / (3 + 1e-5) * a.lora_B @ E.diag() @ a.lora_A, b)
    group = site_group(site)
    left = (a.lora_A @ a.lora_A.T - torch.eye(3)).square().sum().sqrt()
    right = (a.lora_B.T @ a.lora_B - torch.eye(3)).square().sum().sqrt()
    assert torch.allclose(group.penalty(), 0.5 * (left + right) / 2)


def site_group(site: Any) -> Group:
    group = Group("default", config_for("adalora", init_r=3, target_r=2, total_step=9))
    group.layers["0"] = site
    return group


def test_adalora_s_budget_by_hand() -> None:
    """Scores of 3 triplets after two steps, and the budgets 3 + 1 (1 - t / 6)^3 .. 2 of steps 1 .. 6."""
    cfg: dict[str, Any] = dict(init_r=3, target_r=1, tinit=1, tfinal=3, total_step=7, beta1=0.5, beta2=0.25)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config_for("adalora", target_modules=["0"], **cfg))
    a: Any = model.get_base_model()[0].adapters["default"]  # type: ignore[index]
    tensors = {"lora_A": a.lora_A, "lora_E": a.lora_E, "lora_B": a.lora_B}
    mean, spread = ({n: torch.zeros_like(p) for n, p in tensors.items()} for _ in range(2))
    left = []
    for step in range(1, 8):
        with torch.no_grad():
            for i, p in enumerate(tensors.values()):
                p.copy_(torch.sin(torch.arange(p.numel()) * 1.7 + i + step).view_as(p))
                p.grad = torch.cos(torch.arange(p.numel()) * 0.9 + i - step).view_as(p)
            if step < 4:  # importance is watched before the ranks are final
                for n, p in tensors.items():
                    now = (p * p.grad).abs()
                    mean[n] = 0.5 * mean[n] + 0.5 * now
                    spread[n] = 0.25 * spread[n] + 0.75 * (now - mean[n]).abs()
        model.update_and_allocate(step)
        scores = {n: mean[n] * spread[n] for n in tensors}
        triplet = scores["lora_E"][:, 0] + scores["lora_A"].mean(1) + scores["lora_B"].mean(0)
        budget = {1: 3, 2: int(1 + 2 * (2 / 3) ** 3), 3: int(1 + 2 * (1 / 3) ** 3)}.get(step, 1)
        want = torch.zeros(3, dtype=torch.bool)
        want[triplet.argsort(descending=True)[:budget]] = True
        assert torch.equal(a.lora_E[:, 0] != 0, want), step
        left.append(int(want.sum()))
    assert left == [3, 1, 1, 1, 1, 1, 1]
    assert a.kept.sum() == 1


def test_adalora_s_file_forgets_the_ranks_that_an_earlier_file_left_out(tmp_path: Path) -> None:
    """Between two allocations a rank that was taken learns again, and the file is to say what the adapter is now."""
    cfg = config_for("adalora", target_modules=["0"], init_r=3, target_r=1, total_step=9, deltaT=4)
    model, x = get_peft_model(nn.Sequential(nn.Linear(4, 4)), cfg).eval(), torch.randn(2, 4)
    a: Any = model.get_base_model()[0].adapters["default"]  # type: ignore[index]
    for place, E in {"first": [0.3, 0.0, 0.2], "second": [0.3, 0.1, 0.2]}.items():
        a.kept.copy_(torch.tensor([True, False, True]))
        a.lora_E.data[:, 0] = torch.tensor(E)
        model.save_pretrained(tmp_path / place)
        bare = copy.deepcopy(model).unload()
        assert torch.allclose(PeftModel.from_pretrained(bare, tmp_path / place)(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [{}, {"total_step": 0}, {"total_step": 5, "tinit": 3, "tfinal": 2}, {"total_step": 5, "target_r": 20}],
    ids=str,
)
def test_a_schedule_without_room_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"total_step|target_r"):
        config_for("adalora", **fields)
    with pytest.warns(TrimtabWarning, match="does not read r=4"):
        config_for("adalora", total_step=5, r=4)
    with pytest.raises(ConfigError, match="final_warmup"):
        config_for("adamss", use_asa=True, final_warmup=20)


@pytest.mark.parametrize("bias", [True, False])
def test_adamss(bias: bool) -> None:
    site, a, w, b = adapter("adamss", nn.Linear(IN, OUT), r=4, num_subspaces=2, subspace_rank=2)
    if not bias:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(IN, OUT, bias=False)).double()
        model = get_peft_model(made, config_for("adamss", target_modules=["0"], r=4, num_subspaces=2, init_weights=None))
        site = model.get_base_model()[0]
        a, w, b = site.adapters["default"], site.base_layer.weight.detach(), torch.zeros(OUT).double()
    N = a.adamss_newB
    assert N.shape == (4, IN + bias) and torch.allclose(N @ N.T, torch.eye(4, dtype=N.dtype), atol=1e-5)
    delta = torch.zeros(OUT, IN + bias, dtype=w.dtype)
    assert sorted(set(a.adamss_rows.tolist())) == [0, 1]
    for i in range(2):
        delta[a.adamss_rows == i] = a.adamss_B[i] @ a.adamss_A[i] @ N
    holds(site, w + delta[:, :IN], b + delta[:, -1] if bias else b)


def test_adamss_starts_in_the_directions_of_each_cluster() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 12)), config_for("adamss", target_modules=["0"], r=6, num_subspaces=3, subspace_rank=2)
    )
    layer: Any = model.get_base_model()[0]  # type: ignore[index]
    a, W = layer.adapters["default"], torch.cat([layer.base_layer.weight, layer.base_layer.bias[:, None]], 1).detach()
    torch.manual_seed(0)
    U, _, V = torch.svd_lowrank(W, q=6, niter=2)
    assert torch.equal(a.adamss_newB, V.T) and torch.equal(a.adamss_rows, clusters(U, 3))
    for i in range(3):
        rows = U[a.adamss_rows == i]
        gram = rows.T @ rows
        top = torch.linalg.eigh(gram).eigenvectors[:, -len(a.adamss_A[i]) :]
        assert torch.allclose(a.adamss_A[i].T @ a.adamss_A[i], top @ top.T, atol=1e-4)


def test_adamss_s_budget_by_hand() -> None:
    torch.manual_seed(0)
    cfg: dict[str, Any] = dict(r=4, num_subspaces=3, use_asa=True, init_warmup=2, final_warmup=6, mask_interval=2)
    cfg |= dict(asa_target_subspaces=2, asa_importance_beta=0.5, asa_uncertainty_beta=0.25, asa_schedule_exponent=1.0)
    made = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = get_peft_model(made, config_for("adamss", target_modules=["0", "1"], **cfg))
    parts: list[Any] = [layer.adapters["default"] for layer in made]
    clusters = [(part, i) for part in parts for i in range(3)]
    mean, spread = ({}, {})
    live = set(range(6))
    for step in range(1, 8):
        grads = {}
        for k, (part, i) in enumerate(clusters):
            for side, p in (("A", part.adamss_A[i]), ("B", part.adamss_B[i])):
                with torch.no_grad():
                    p.copy_(torch.sin(torch.arange(p.numel()) * 1.3 + k + step).view_as(p))
                p.grad = torch.cos(torch.arange(p.numel()) * 0.7 + k * step).view_as(p) if k in live else None
                grads[k, side] = p
                if 2 <= step <= 6 and k in live:
                    now = (p * p.grad).abs().detach()
                    old = mean.get((k, side), torch.zeros_like(now))
                    spread[k, side] = 0.25 * spread.get((k, side), torch.zeros_like(now)) + 0.75 * (now - old).abs()
                    mean[k, side] = 0.5 * old + 0.5 * now
        model.update_and_allocate(step)
        if step in (2, 4, 6):
            count = {2: 6, 4: 4, 6: 2}[step]  # 2 + (6 - 2) (1 - (step - 2) / 4)
            score = {k: sum((mean[k, s] * spread[k, s]).mean().item() for s in "AB") for k in live}
            live = set(sorted(score, key=lambda k: -score[k])[:count])
            mean, spread = ({}, {})  # each interval starts anew
        assert {k for k, (part, i) in enumerate(clusters) if part.on[i]} == live, step
    assert len(live) == 2
    model(torch.randn(3, 6)).sum().backward()
    for k, (part, i) in enumerate(clusters):  # the others are constants
        assert (part.adamss_B[i].grad is not None) == (k in live)


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

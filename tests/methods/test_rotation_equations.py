"""Rotations, spectra, sparse and shared updates: each equation written out by hand on one small layer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_equations import IN, OUT, adapter, holds
from torch import Tensor

from trimtab import PeftModel, get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import ConfigError, NotSupported, TrimtabWarning
from trimtab.methods._wavelets import NAMES, low_pass

EYE = torch.eye(IN, dtype=torch.float64)


def cayley(S: Tensor) -> Tensor:
    eye = torch.eye(len(S), dtype=S.dtype)
    return (eye - S) @ torch.linalg.inv(eye + S)


# -- BOFT -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (2, 1), (2, 2), (2, 3)])
def test_boft(size: int, factors: int) -> None:
    site, a, w, b = adapter("boft", boft_block_size=size, boft_n_butterfly_factor=factors)
    R = EYE
    for i, blocks in enumerate(a.boft_R.detach()):
        D = torch.block_diag(*(cayley((A - A.T) / 2) for A in blocks))
        P, k = torch.zeros(IN, IN, dtype=torch.float64), 0
        for run in range(0, IN, size * 2**i):  # of each run the even half-blocks, then the odd ones
            halves = [range(s, s + size // 2) for s in range(run, run + size * 2**i, size // 2)]
            for source in [j for half in halves[::2] + halves[1::2] for j in half]:
                P[k, source], k = 1, k + 1
        R = P @ D @ P.T @ R
    assert torch.allclose(R @ R.T, EYE)
    assert (R != 0).sum(1).tolist() == [size * 2 ** (factors - 1)] * IN  # each factor doubles who meets whom
    holds(site, a.boft_s * (w @ R.T), b)


def test_boft_s_dropout_leaves_that_share_of_one_factor_s_blocks_unrotated() -> None:
    _, a, _, _ = adapter("boft", boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5)
    assert (a.eval().blocks() == torch.eye(2)).all((2, 3)).sum() == 0
    for seed in range(5):
        torch.manual_seed(seed)
        still = (a.train().blocks() == torch.eye(2)).all((2, 3)).sum(1).tolist()
        assert sorted(still) == [0, 2]  # of 2 x 4


# -- HRA --------------------------------------------------------------------------------------------------------------
def test_hra() -> None:
    site, a, w, b = adapter("hra", r=4)
    H = EYE
    for u in a.hra_u.detach().T:
        H = H @ (EYE - 2 * torch.outer(u, u) / u.dot(u))
    assert torch.allclose(H @ H.T, EYE)
    holds(site, w @ H, b)


def test_hra_on_orthogonal_hyperplanes() -> None:
    site, a, w, b = adapter("hra", r=3, apply_GS=True, init_weights=False)
    q: list[Tensor] = []
    for u in a.hra_u.detach().T:
        for other in q:
            u = u - u.dot(other) * other
        q.append(u / u.norm())
    Q = torch.stack(q, 1)
    holds(site, w @ (EYE - 2 * Q @ Q.T), b)


def test_hra_says_where_it_does_not_start_as_the_base() -> None:
    with pytest.warns(TrimtabWarning, match="r=3 is odd"):
        _, a, _, _ = adapter("hra", r=3)
    assert not a.starts_at_base and adapter("hra", r=2)[1].starts_at_base


# -- RoAd -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group", [2, 6])
def test_road(group: int, variant: str) -> None:
    site, a, w, b = adapter("road", group_size=group, variant=variant)
    theta, alpha = a.road_theta.detach().tolist(), a.road_alpha.detach().tolist()
    R, half = torch.zeros(OUT, OUT, dtype=torch.float64), group // 2
    for i in range(OUT):
        start, place = i - i % group, i % group
        other = start + (place + half) % group  # the output that this one turns with
        sign = -1 if place < half else 1
        if variant == "road_1":
            c = s = start // 2 + place % half
        elif variant == "road_2":
            c = s = i
        else:
            c, s = 2 * start + place, 2 * start + group + place
        R[i, i] = alpha[c] * math.cos(theta[c])
        R[i, other] = sign * alpha[s] * math.sin(theta[s])
    holds(site, R @ w, R @ b)


# -- PSOFT ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("init", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("terms", [None, 1, 2, 3, 4, 5, 8])
def test_psoft(terms: int | None, init: str) -> None:
    series = {} if terms is None else {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms}
    site, a, w, b = adapter("psoft", r=3, ab_svd_init=init, **series)
    v, turn = a.psoft_R.weight.detach(), a.psoft_R
    Q, eye = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    Q[0, 1], Q[0, 2], Q[1, 2] = v
    Q = Q - Q.T
    if terms is None:
        R = (eye + Q) @ torch.linalg.inv(eye - Q)
        assert torch.allclose(R @ R.T, eye)
    else:  # I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1); two terms: I + 2 Q
        weights = [1.0, *[2.0] * (terms - 2), 1.0 if terms > 2 else 2.0][:terms]
        R = sum((c * torch.linalg.matrix_power(Q, k) for k, c in enumerate(weights)), torch.zeros(3, 3))
    R = turn.vector_b.diag() @ R @ turn.vector_a.diag()
    U, S, Vt = torch.linalg.svd(w.float(), full_matrices=False)
    U, S, Vt = U[:, :3].double(), S[:3].double(), Vt[:3].double()
    left, right = (U @ S.diag(), Vt) if init == "psoft_init" else (U @ S.sqrt().diag(), S.sqrt().diag() @ Vt)
    x = torch.randn(5, IN, dtype=torch.float64)
    assert (site(x) - x @ (w + left @ (R - eye) @ right).T - b).abs().max() < 1e-6  # S V^T is found in float32


def test_psoft_s_series_bounds_the_norm_and_its_matrix_may_be_free() -> None:
    _, a, _, _ = adapter(
        "psoft", r=3, use_cayley_neumann=True, cayley_neumann_eps=0.2, psoft_mag_a=False, psoft_mag_b=False
    )
    with torch.no_grad():
        a.psoft_R.weight.copy_(torch.tensor([0.3, 0.4, 1.2]))  # |Q| = 1.3 sqrt(2)
        far = a.psoft_R()
        a.psoft_R.weight.mul_(0.2 / (1.3 * 2**0.5))
        assert torch.allclose(far, a.psoft_R())
    _, free, _, _ = adapter("psoft", r=3, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False)
    assert torch.equal(free.psoft_R(), free.psoft_R.weight) and free.psoft_R.weight.shape == (3, 3)


# -- FourierFT --------------------------------------------------------------------------------------------------------
def test_fourierft() -> None:
    site, a, w, b = adapter("fourierft", n_frequency=5, scaling=3.0, random_loc_seed=4, n_frequency_pattern={"0": 3})
    assert not a.starts_at_base and a.fourierft_spectrum.shape == (3,)
    order = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(4))[:3].tolist()
    change = torch.zeros_like(w)
    for c, place in zip(a.fourierft_spectrum.tolist(), order, strict=True):
        for o in range(OUT):
            for i in range(IN):
                change[o, i] += c * math.cos(2 * math.pi * (place // IN * o / OUT + place % IN * i / IN)) / (OUT * IN)
    holds(site, w + 3 * change, b)


def test_more_waves_than_weights_are_refused() -> None:
    with pytest.raises(NotSupported, match=r"n_frequency=49, and it has 48 weights"):
        adapter("fourierft", n_frequency=49)


# -- WaveFT -----------------------------------------------------------------------------------------------------------
def synthesis(low: Tensor, rows: int, coefficients: int) -> Tensor:
    """(rows, coefficients) of one inverse transform: the filters, every second row, half low and half high; the middle."""
    high = low.flip(0) * torch.tensor([(-1.0) ** i for i in range(len(low))])
    S = torch.zeros(coefficients + len(low) - 2, coefficients, dtype=torch.float64)
    for j in range(coefficients // 2):
        S[2 * j : 2 * j + len(low), j] = low
        S[2 * j : 2 * j + len(low), coefficients // 2 + j] = high
    start = (len(S) - rows) // 2
    return S[start : start + rows]


@pytest.mark.parametrize("wavelet", ["db1", "db2", "db10", "db20", "sym2", "sym7", "coif1", "coif3"])
def test_waveft(wavelet: str) -> None:
    layer = torch.nn.Linear(IN, OUT + 1)  # an odd size
    site, a, w, b = adapter("waveft", layer, n_frequency=9, scaling=3.0, random_loc_seed=4, wavelet_family=wavelet)
    low, (out, inn) = low_pass(wavelet), w.shape
    margin = len(low) - 2
    wide = [out + margin + 1, inn + margin]
    F = torch.zeros(wide, dtype=torch.float64)
    order = torch.randperm(out * inn, generator=torch.Generator().manual_seed(4))[:9].tolist()
    for c, place in zip(a.waveft_spectrum.tolist(), order, strict=True):
        F[place // inn + (margin + 1) // 2, place % inn + margin // 2] = c
    (low_low, high_low), (low_high, high_high) = (half.chunk(2, 1) for half in F.chunk(2))  # the rows' filter first
    F = torch.cat([torch.cat([low_low, low_high], 1), torch.cat([high_low, high_high], 1)])
    holds(site, w + 3 * synthesis(low, out, wide[0]) @ F @ synthesis(low, inn, wide[1]).T, b)


@pytest.mark.parametrize("wavelet", NAMES)
def test_wavelets_are_orthogonal(wavelet: str) -> None:
    low = low_pass(wavelet)
    assert low.sum().item() == pytest.approx(2**0.5, abs=1e-12)
    for shift in range(0, len(low), 2):
        assert (low[shift:] * low[: len(low) - shift]).sum().item() == pytest.approx(float(shift == 0), abs=1e-7)


def test_waveft_without_the_transform_and_in_proportion() -> None:
    site, a, w, b = adapter("waveft", n_frequency=9, scaling=3.0, use_idwt=False)
    change = torch.zeros(OUT * IN, dtype=torch.float64)
    change[torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(777))[:9]] = a.waveft_spectrum.detach()
    holds(site, w + 3 * change.view(OUT, IN), b)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 28))
    fields = {"target_modules": ["0", "1"], "n_frequency": 8, "proportional_parameters": True}
    made = get_peft_model(model, config_for("waveft", **fields)).get_base_model()
    assert [layer.adapters["default"].waveft_spectrum.numel() for layer in made] == [2, 14]


# -- C3A --------------------------------------------------------------------------------------------------------------
def test_c3a() -> None:
    site, a, w, b = adapter("c3a", block_size=7, block_size_pattern={"0": 2}, init_weights="gaussian")
    assert not a.starts_at_base and a.c3a_kernel.shape == (OUT // 2, IN // 2, 2)
    change = torch.zeros_like(w)
    for o in range(OUT):
        for i in range(IN):
            change[o, i] = a.c3a_kernel[o // 2, i // 2, (i - o) % 2]
    holds(site, w + change / IN, b)
    site, a, w, b = adapter("c3a", torch.nn.Linear(IN, 4), block_size=4)
    change = torch.stack([torch.cat([k.roll(row) for k in a.c3a_kernel[0].detach()]) for row in range(4)])
    holds(site, w + change / IN, b)


# -- MiSS -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("r", [2, 3, 8])  # of 8 inputs: four shards; two and a short one; one
def test_miss(r: int) -> None:
    site, a, w, b = adapter("miss", r=r)
    M = a.miss_block.detach()  # (r, out)
    holds(site, w + torch.stack([M[i % r] for i in range(IN)], 1), b)
    x = torch.randn(IN, dtype=torch.float64)
    shards = sum(torch.nn.functional.pad(x[k : k + r], (0, r - len(x[k : k + r]))) for k in range(0, IN, r))
    assert torch.allclose(site(x), w @ x + b + M.T @ shards)


def test_miss_mini_repeats_its_columns_over_the_outputs() -> None:
    site, a, w, b = adapter("miss", r=4, mini_r=3, init_weights="mini")
    M = a.miss_block.detach()
    assert M.shape == (4, 3)
    holds(site, w + torch.stack([torch.stack([M[i % 4, o % 3] for i in range(IN)]) for o in range(OUT)]), b)


def test_bat_changes_each_block_by_its_product_with_m() -> None:
    site, a, w, b = adapter("miss", r=2, init_weights="bat")
    M, new = a.miss_block.detach(), w.clone()
    assert M.shape == (OUT // 2, 2, 2) and not a.additive
    for i in range(0, OUT, 2):
        for j in range(0, IN, 2):
            block = w[i : i + 2, j : j + 2]
            new[i : i + 2, j : j + 2] = block + block @ M[i // 2] + M[i // 2]
    holds(site, new, b)


def test_shards_that_do_not_fit_are_refused() -> None:
    for fields in ({"r": 9}, {"r": 3, "init_weights": "bat"}, {"r": 2, "mini_r": 4, "init_weights": "mini"}):
        with pytest.raises(NotSupported, match="do not fit its weight 6 x 8"):
            adapter("miss", **fields)


@pytest.mark.parametrize("init", [True, "bat"])
def test_bone_is_miss(init: bool | str) -> None:
    site, a, _, _ = adapter("bone", r=2, init_weights=init)
    other, b, _, _ = adapter("miss", r=2, init_weights=init)
    b.miss_block.data.copy_(a.miss.miss_block)
    x = torch.randn(5, IN, dtype=torch.float64)
    assert torch.equal(site(x), other(x)) and site.bone_block["default"] is a.miss.miss_block


# -- BEFT -------------------------------------------------------------------------------------------------------------
def test_beft() -> None:
    site, a, w, b = adapter("beft")
    assert a.beft_bias.shape == (1, OUT)
    holds(site, w, b + a.beft_bias[0])


def test_beft_is_merged_into_a_layer_without_a_bias_and_says_what_a_saved_copy_loses() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model = get_peft_model(layers, config_for("beft", target_modules=["0", "1"], init_weights=False))
    x = torch.randn(3, 4)
    want = model(x)
    with pytest.warns(TrimtabWarning, match="'0' and 1 more layers have a bias now, which Sequential does not make"):
        merged = model.merge_and_unload()
    assert torch.allclose(merged(x), want, atol=1e-6) and sorted(merged.state_dict())[:2] == ["0.bias", "0.weight"]
    for norm in (torch.nn.RMSNorm(4), torch.nn.LayerNorm(4, bias=False)):
        with pytest.raises(NotSupported, match="cannot have a bias"):
            get_peft_model(torch.nn.Sequential(norm), config_for("beft", target_modules=["0"]))


# -- SHiRA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [None, 3])
def test_shira(seed: int | None) -> None:
    site, a, w, b = adapter("shira", r=2, random_seed=seed)
    draw = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
    places = sorted(torch.randperm(OUT * IN, generator=draw)[: 2 * (OUT + IN)].tolist())
    assert a.shira_indices.dtype == torch.int32 and a.shira_indices.T.tolist() == [[p // IN, p % IN] for p in places]
    new = w.clone()
    for v, p in zip(a.shira_weight.detach(), places, strict=True):
        new[p // IN, p % IN] += v
    holds(site, new, b)


def test_few_tokens_are_computed_entry_by_entry_and_many_with_the_weight() -> None:
    for method, fields in (
        ("shira", {"r": 1}),
        ("supertuning", {"sparsity": 0.98}),
        ("supertuning", {"sparsity": 0.98, "r": 2}),
    ):
        site, a, w, b = adapter(method, torch.nn.Linear(64, 96), **fields)
        for tokens in (1, 2, 50):
            x, g = torch.randn(tokens, 64, dtype=torch.float64), torch.randn(tokens, 96, dtype=torch.float64)
            results = []
            for y in (site(x), x @ a.weight(w).T + b):
                results.append([y, *torch.autograd.grad(y, list(a.parameters()), g)])
            for fast, plain in zip(*results, strict=True):
                assert torch.allclose(fast, plain, atol=1e-12)


def test_shira_with_a_mask_of_one_s_own(tmp_path: Path) -> None:
    def make() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 8))

    config = config_for("shira", target_modules=["0"], r=2, mask_type="band", init_weights=False)
    with pytest.raises(NotSupported, match=r"'band' needs a function in config\.mask_fn"):
        get_peft_model(make(), config)
    config.mask_fn = lambda layer, r: torch.ones_like(layer.weight)
    with pytest.raises(NotSupported, match="chose 64 entries, and r=2 means 32"):
        get_peft_model(make(), config)
    config.mask_fn = lambda layer, r: torch.cat([torch.ones(4, 8), torch.zeros(4, 8)])
    model, x = get_peft_model(make(), config).eval(), torch.randn(2, 8)
    model.save_pretrained(tmp_path)
    assert "mask_fn" not in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(x), model(x))
    with pytest.raises(NotSupported, match="mask_fn"):
        PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    again = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True, config=config)
    assert torch.equal(again(x), model(x))


# -- Super-Tuning -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("r", [None, 2])
def test_super_tuning(r: int | None, top: bool) -> None:
    site, a, w, b = adapter("supertuning", sparsity=0.8, select_top=top, r=r)
    places = sorted(range(OUT * IN), key=lambda p: w[p // IN, p % IN].abs().item(), reverse=top)[:9]
    assert a.supertuning_indices.tolist() == places  # 9 = int(48 * 0.2)
    new = w.clone()
    for v, p in zip(a.supertuning_values.detach(), places, strict=True):
        new[p // IN, p % IN] += v
    if r:  # Supra; alpha is 2 r where nothing is said
        new += 2 * a.supertuning_lora_B.weight @ a.supertuning_lora_A.weight
    holds(site, new.detach(), b)


def test_super_tuning_needs_an_entry_and_supra_a_rank() -> None:
    with pytest.raises(NotSupported, match=r"sparsity=0\.99 leaves 0 of its 48 entries"):
        adapter("supertuning")
    with pytest.raises(ConfigError, match="without r there is none"):
        config_for("supertuning", lora_alpha=4)


# -- OSF --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("out", [4, 8, 11])
@pytest.mark.parametrize(("rank", "k"), [(None, 0.5), (3, 3), (0.75, 0.75)])
def test_osf(rank: float | None, k: float, out: int) -> None:
    site, a, w, b = adapter("osf", torch.nn.Linear(IN, out), effective_rank=rank)
    m = min(out, IN)
    k = int(m * k) if isinstance(k, float) else k
    U, S, V = (t.double() for t in torch.linalg.svd(w.float(), full_matrices=False))
    p = a.osf_svd_params
    assert p["U_low"].shape == (out, m - k) and p["S_low"].shape == (m - k,) and p["V_low"].shape == (m - k, IN)
    high = (w - U[:, k:] @ S[k:].diag() @ V[k:]).detach()
    x, g = torch.randn(5, IN, dtype=torch.float64), torch.randn(5, out, dtype=torch.float64)
    y = site(x)
    assert (y - x @ (high + p["U_low"] @ p["S_low"].diag() @ p["V_low"]).T - b).abs().max() < 1e-5  # S V in float32
    (y * g).sum().backward()
    full = g.T @ x  # the gradient of the weight
    for name, basis, plain in (
        ("U_low", U[:, :k], full @ p["V_low"].T @ p["S_low"].diag()),
        ("V_low", V[:k].T, (p["S_low"].diag() @ p["U_low"].T @ full).T),
    ):
        grad = p[name].grad if name == "U_low" else p[name].grad.T
        assert (basis.T @ grad).abs().max() < 1e-5 * grad.abs().max()
        assert torch.allclose(grad, (plain - basis @ basis.T @ plain).detach(), atol=1e-5)


def test_osf_s_ranks_by_name_are_searched_for_and_must_leave_something_to_train() -> None:
    for pattern, rank in (({"0": 2}, 2), ({}, 3)):
        assert adapter("osf", rank_pattern=pattern)[1].osf_svd_params["S_low"].numel() == OUT - rank
    for rank in (0, 6, 7, 1.0, 0.1):
        with pytest.raises(NotSupported, match="some stay, some are trained"):
            adapter("osf", effective_rank=rank)

"""LoRA's variants, written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_equations import IN, OUT, adapter, holds
from torch import nn

import trimtab
from trimtab import get_peft_model
from trimtab.core.config import config_for, method_of
from trimtab.core.group import Group
from trimtab.errors import ConfigError, NotSupported


def group_of(site: Any, method: str, **fields: Any) -> Group:
    group = Group("default", config_for(method, **fields))
    group.layers["0"] = site
    return group


def test_kasa() -> None:
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "kasa_config": {"beta": 0.5, "gamma": 2.0}}
    site, a, w, b = adapter("kasa", **fields)
    A, B, d = a.lora.lora_A.weight, a.lora.lora_B.weight, a.lora_diag
    U, S, V = torch.linalg.svd(w, full_matrices=False)
    left = sum(S[i] * torch.outer(U[:, i], V[i]) for i in range(OUT - 2))
    holds(site, left + 3 * B @ d.diag() @ A, b)
    assert torch.linalg.matrix_rank(left) == OUT - 2
    one = torch.eye(2)
    want = 0.5 * (d @ d) + 2 * ((A @ A.T - one).square().sum().sqrt() + (B.T @ B - one).square().sum().sqrt())
    assert torch.allclose(group_of(site, "kasa", **fields).penalty(), want)


def test_two_kasa_adapters_each_take_their_own_components_away() -> None:
    site, _, w, b = adapter("kasa", r=2)
    model = get_peft_model(nn.Sequential(site.base_layer), config_for("kasa", r=2, target_modules=["0"]))
    model.add_adapter("wide", config_for("kasa", r=4, target_modules=["0"]))
    U, S, V = torch.linalg.svd(w, full_matrices=False)
    x = torch.randn(3, IN, dtype=torch.float64)
    for name, r in (("default", 2), ("wide", 4)):
        model.set_adapter(name)
        assert torch.allclose(model(x), x @ ((U[:, :-r] * S[:-r]) @ V[:-r]).T + b)


@pytest.mark.parametrize("side", ["a", "b"])
def test_bdlora(side: str) -> None:
    options = {f"target_modules_bd_{side}": ["0"], "nblocks": 2}
    site, a, w, b = adapter("bdlora", r=4, lora_alpha=6, use_bdlora=options)
    A, B = a.lora.lora_A.weight, a.lora.lora_B.weight
    assert (A.shape, B.shape) == (((4, IN // 2), (OUT, 4)) if side == "a" else ((4, IN), (OUT, 2)))
    delta = torch.zeros_like(w)
    for i in range(2):  # block i: of A, ranks 2i and 2i + 1 read half i of the inputs; of B, they write half i of the outputs
        ranks = slice(2 * i, 2 * i + 2)
        if side == "a":
            delta[:, 4 * i : 4 * i + 4] += 1.5 * B[:, ranks] @ A[ranks]
        else:
            delta[3 * i : 3 * i + 3] += 1.5 * B[3 * i : 3 * i + 3] @ A[ranks]
    holds(site, w + delta, b)


def test_bdlora_starts_as_its_init_says() -> None:
    for init, spread, other in ((True, (3 / (IN / 2)) ** 0.5 / 1.5**0.5, 0), ("gaussian", 1 / 64, 0), (False, 0.29, 0.07)):
        options = {"target_modules_bd_a": ["0"], "nblocks": 2}
        cfg = config_for("bdlora", r=64, target_modules=["0"], use_bdlora=options, init_lora_weights=init)
        layer: Any = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), cfg).get_base_model()[0]  # type: ignore[index]
        a = layer.adapters["default"].lora
        assert a.lora_A.weight.std().item() == pytest.approx(spread, rel=0.2), init
        assert a.lora_B.weight.std().item() == pytest.approx(other, rel=0.2), init


def test_bdlora_names_each_layer_once_and_only_what_divides() -> None:
    def make(layer: nn.Module, r: int = 4, **options: Any) -> None:
        more = {"lora_bias": options.pop("lora_bias", False)}
        get_peft_model(nn.Sequential(layer), config_for("bdlora", r=r, target_modules=["0"], use_bdlora=options, **more))

    linear, a, b = nn.Linear(IN, OUT), "target_modules_bd_a", "target_modules_bd_b"
    with pytest.raises(ConfigError, match=r"named neither by .* match_strict=False"):
        make(linear, **{a: ["q_proj"]})
    make(linear, **{a: ["q_proj"], "match_strict": False})
    with pytest.raises(ConfigError, match="named both by"):
        make(nn.Linear(IN, OUT), **{a: ["0"], b: [""]})
    with pytest.raises(ConfigError, match="'0' is both in"):
        make(linear, **{a: ["0"], b: ["0"]})
    with pytest.raises(NotSupported, match=r"A \(4 x 8\) has no 3 equal blocks"):
        make(nn.Linear(IN, OUT), **{a: ["0"], "nblocks": 3})
    with pytest.raises(NotSupported, match=r"B \(6 x 4\) has no 4 equal blocks"):
        make(nn.Linear(IN, OUT), **{b: ["0"], "nblocks": 4})
    with pytest.raises(NotSupported, match="lora_bias"):
        make(nn.Linear(IN, OUT), **{b: ["0"], "nblocks": 2, "lora_bias": True})
    make(nn.Linear(IN, OUT), **{a: ["0"], "nblocks": 2, "lora_bias": True})


def test_qalora() -> None:
    site, a, w, b = adapter("qalora", r=2, lora_alpha=6, qalora_group_size=4)
    A, B = a.lora.lora_A.weight, a.lora.lora_B.weight  # (2, 2), (6, 2)
    x = torch.randn(5, IN, dtype=torch.float64)
    means = torch.stack([x[:, :4].mean(1), x[:, 4:].mean(1)], 1)
    assert (site(x) - (x @ w.T + b + 3 * (2 * means) @ A.T @ B.T)).abs().max() < 1e-12
    holds(site, w + 3 * B @ (2 / 4 * A[:, [0, 0, 0, 0, 1, 1, 1, 1]]), b)
    with pytest.raises(NotSupported, match="qalora_group_size=16 does not divide 8 inputs"):
        get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config_for("qalora", target_modules=["0"]))


def test_velora_keeps_one_number_a_group() -> None:
    """8 inputs in 3 groups of 3, the last one filled up with a zero."""
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "velora_config": {"num_groups": 3, "scale": 0.5}}
    site, a, w, b = adapter("velora", **fields)
    A, B = a.lora.lora_A.weight, a.lora.lora_B.weight
    x, g = (torch.randn(5, n, dtype=torch.float64) for n in (IN, OUT))
    x.requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = site.train()(x)
    assert torch.allclose(y, x @ (w + 3 * B @ A).T + b)
    (y * g).sum().backward()
    filled = torch.cat([x.detach(), torch.zeros(5, 1)], 1).view(5, 3, 3)
    v = filled.mean((0, 1)) / filled.mean((0, 1)).norm()
    assert torch.allclose(a.lora_velora_embed, v)
    guess = 0.5 * ((filled @ v)[..., None] * v).flatten(1)[:, :IN]
    assert torch.allclose(A.grad, 3 * B.T @ g.T @ guess) and torch.allclose(x.grad, g @ (w + 3 * B @ A))
    assert torch.allclose(B.grad, 3 * g.T @ x.detach() @ A.T.detach())
    assert not any(t.shape == x.shape for t in kept) and any(t.shape == (5, 3) for t in kept)
    A.grad = None
    (site.eval()(x) * g).sum().backward()
    assert torch.allclose(A.grad, 3 * B.T @ g.T @ x.detach())


def test_two_forwards_of_velora_before_a_backward_have_each_their_own_direction() -> None:
    site, a, _, _ = adapter("velora", r=2, velora_config={"num_groups": 2})
    x, z = (torch.randn(4, IN, dtype=torch.float64) for _ in range(2))
    found = []
    for inputs in ((x,), (z,), (x, z)):
        a.zero_grad()
        sum(site.train()(i).square().sum() for i in inputs).backward()
        found.append(a.lora.lora_A.weight.grad.clone())
    assert torch.allclose(found[0] + found[1], found[2])


def test_velora_under_autocast() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config_for("velora", r=2, target_modules=["0"])).train()
    x, grads = torch.randn(4, IN), []
    for on in (False, True):
        model.zero_grad()
        with torch.no_grad():
            model.get_base_model()[0].adapters["default"].lora.lora_B.weight.fill_(0.5)  # type: ignore[index]
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = model(x)
        y.float().sum().backward()
        grads.append(model.get_base_model()[0].adapters["default"].lora.lora_A.weight.grad.clone())  # type: ignore[index]
    assert grads[1].dtype == torch.float32 and (grads[0] - grads[1]).abs().max() < 0.05 * grads[0].abs().max()


def test_monteclora_is_lora_outside_of_training() -> None:
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "monteclora_config": {"sample_scaler": 0.5, "kl_loss_weight": 2.0}}
    site, a, w, b = adapter("monteclora", **fields)
    site.eval()
    holds(site, w + 3 * a.lora.lora_B.weight @ a.lora.lora_A.weight, b)
    x = torch.randn(3, IN, dtype=torch.float64)
    site.train()
    first, sampler = site(x), a.lora_monteclora_sampler
    assert (first - site(x)).abs().max() > 1e-3
    assert torch.equal(sampler.gaussian_var_prior, sampler.v().diag()) and torch.equal(sampler.expert_weights, sampler.p())
    v, alpha = sampler.v(), sampler.expert_weights_prior.exp()
    Dirichlet = torch.distributions.Dirichlet
    weights = torch.distributions.kl_divergence(Dirichlet(alpha), Dirichlet(torch.full((8,), 0.1, dtype=v.dtype)))
    spread = sampler.std_prior.exp().square()  # Wishart(2, diag spread) from Wishart(2, 1)
    wishart = 2 / 2 * (spread.sum() - 2 - spread.log().sum())
    normal = 8 / 2 * (v.sum() - 2 - v.log().sum())
    assert torch.allclose(group_of(site, "monteclora", **fields).penalty(), 2 * (weights + wishart + normal))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kasa", {"kasa_config": {"beta": -1}}, "beta=-1"),
        ("kasa", {"kasa_config": {"bta": 1}}, "no option 'bta'. Did you mean 'beta'"),
        ("kasa", {"kasa_config": 3}, "it is a KasaConfig, or a mapping"),
        ("velora", {"velora_config": {"init_type": "once"}}, "init_type='once'"),
        ("velora", {"velora_config": {"scale": 0}}, "scale=0: it is above 0"),
        ("velora", {"velora_config": {"num_groups": 0}}, "num_groups=0"),
        ("monteclora", {"monteclora_config": {"dirichlet_prior": 0}}, "dirichlet_prior=0: it is above 0"),
        ("monteclora", {"monteclora_config": {"num_samples": 0}}, "num_samples=0"),
        ("bdlora", {"use_bdlora": {"nblocks": 0}}, "nblocks=0"),
    ],
)
def test_options_of_variants_are_checked(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for(method, **options)


def test_options_are_given_as_an_object_a_mapping_or_true() -> None:
    ways = [trimtab.KasaConfig(beta=1e-4), {"beta": 1e-4}, {}, True]
    made = [trimtab.LoraConfig(kasa_config=way) for way in ways]
    assert all(m == made[0] and m.to_dict()["kasa_config"] == {"beta": 1e-4, "gamma": 1e-3} for m in made)
    assert {method_of(m).name for m in made} == {"kasa"}
    for off in (None, False):
        assert method_of(trimtab.LoraConfig(kasa_config=off)).name == "lora"
    classes = [trimtab.BdLoraConfig, trimtab.VeloraConfig, trimtab.MontecloraConfig]
    assert [c().__class__.__name__ for c in classes] == ["BdLoraConfig", "VeloraConfig", "MontecloraConfig"]


def test_what_does_not_fit_is_refused() -> None:
    for method, layer, message in (
        ("kasa", nn.Linear(IN, 8), "r=8 takes away the whole weight"),
        ("kasa", nn.Conv2d(16, 16, 3, groups=2), "groups"),
        ("velora", nn.Conv1d(4, 4, 1), "VeLoRA does not fit"),
        ("qalora", nn.Embedding(16, 16), "QA-LoRA does not fit"),
    ):
        with pytest.raises(NotSupported, match=message):
            get_peft_model(nn.Sequential(layer), config_for(method, target_modules=["0"]))
    for pair in ({"use_dora": True, "kasa_config": {}}, {"use_qalora": True, "velora_config": {}}):
        with pytest.raises(NotSupported, match="cannot be combined"):
            method_of(trimtab.LoraConfig(**pair))


def test_mica() -> None:
    site, a, w, b = adapter("lora", r=2, lora_alpha=6, init_lora_weights="mica")
    U = torch.linalg.svd(w)[0][:, OUT - 2 :]
    assert [n for n, _ in a.named_parameters()] == ["lora_A.weight"]
    assert torch.allclose(a.lora_B.weight @ a.lora_B.weight.T, U @ U.T)
    holds(site, w + 3 * a.lora_B.weight @ a.lora_A.weight, b)
    cfg = config_for("lora", r=7, init_lora_weights="mica", target_modules=["0"])
    with pytest.raises(ConfigError, match="has 6 components, and r is 7"):
        get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), cfg)
    cfg.r = 2  # type: ignore[attr-defined]
    with pytest.raises(NotSupported, match="groups"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), cfg)

"""LoRA's variants: peft's adapters in our hands and ours in peft's, their gradients and penalties, and where peft differs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from theirs import base, close, configs, exchange, inputs, keys, logits, move, quiet_peft, same_settings
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

import trimtab
from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.methods.monteclora import Sampler

BLOCKS_A = {"target_modules_bd_a": ["q_proj", "query", "q"], "nblocks": 2, "match_strict": False}
BLOCKS_B = {"target_modules_bd_b": ["v_proj", "value", "v"], "nblocks": 4, "match_strict": False}
KASA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "kasa_config": {"beta": 0.5}}
MONTE: dict[str, Any] = {"r": 4, "monteclora_config": {"num_samples": 3, "sample_scaler": 0.1, "kl_loss_weight": 0.2}}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("kasa", KASA, "llama bert t5"),
    ("kasa", KASA | {"rank_pattern": {"v_proj": 7}, "use_rslora": True}, "llama"),
    ("bdlora", {"use_bdlora": BLOCKS_A}, "llama bert t5"),
    ("bdlora", {"use_bdlora": BLOCKS_B, "lora_alpha": 24}, "llama bert t5"),
    ("velora", {"velora_config": {"num_groups": 4}}, "llama gpt2 bert t5"),
    ("velora", {"velora_config": {"num_groups": 7, "init_type": "random", "scale": 2.0}, "lora_dropout": 0.3}, "llama"),
    ("monteclora", MONTE, "llama gpt2 bert t5"),
]


@pytest.mark.parametrize(
    ("method", "options", "model"), [(m, o, name) for m, o, names in CASES for name in names.split()], ids=str
)
def test_exchange(method: str, options: dict[str, Any], model: str, tmp_path: Path) -> None:
    exchange(model, *configs(method, model, **options), tmp_path)


def pair(method: str, **options: Any) -> tuple[Any, Any]:
    """Our model and theirs in training mode with the same values, trained tensors off their start."""
    ours, theirs = configs(method, "llama", target_modules=["q_proj", "v_proj"], **options)
    them = quiet_peft(base("llama"), theirs).train()
    move(them)
    us = trimtab.get_peft_model(base("llama"), ours).train()
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    return us, them


def adapters(model: Any) -> list[tuple[str, Any]]:
    return list(model.get_base_model().trimtab_groups["default"].sites())


def same_gradients(us: Any, them: Any, losses: list[Tensor], bound: float = 1e-5) -> None:
    close(*losses, bound=1e-5)
    for loss in losses:
        loss.backward()
    grads = {k.replace(".default", "").removesuffix(".weight"): p.grad for k, p in them.named_parameters()}
    grads = {k: g for k, g in grads.items() if g is not None}
    seen = 0
    for path, adapter in adapters(us):
        for key, p in adapter.named_parameters():
            name = adapter.published(key).removesuffix(".weight")
            close(p.grad, grads[f"base_model.model.{path}.{name}"], bound)
            seen += 1
    assert seen == len(grads) > 0


def task(model: Any) -> Any:
    """The loss without penalties."""
    model = model.get_base_model() if isinstance(model, trimtab.PeftModel) else model
    return model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kasa", KASA),
        ("bdlora", {"use_bdlora": BLOCKS_A | BLOCKS_B | {"target_modules_bd_a": ["q_proj"]}}),
        ("velora", {"velora_config": {"num_groups": 4}}),
        ("velora", {"velora_config": {"num_groups": 5, "scale": 0.3, "init_type": "batch_average_once"}}),
    ],
    ids=str,
)
def test_gradients_in_training_are_peft_s(method: str, options: dict[str, Any]) -> None:
    us, them = pair(method, **options)
    same_gradients(us, them, [task(us), task(them)])
    if method == "velora":
        mine, those = trimtab.get_peft_model_state_dict(us), peft.get_peft_model_state_dict(them)
        found = [k for k in mine if k.endswith("lora_velora_embed")]
        assert len(found) == 4
        for k in found:
            close(mine[k], those[k], 1e-6)
            assert mine[k].norm() == pytest.approx(1)


def test_the_direction_of_the_first_batch_stays_through_a_reload_where_peft_forgets_it(tmp_path: Path) -> None:
    us, them = pair("velora", velora_config={"num_groups": 4, "init_type": "batch_average_once"})
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_velora_embed"
    ids = inputs("llama")["input_ids"]
    task(us), task(them)
    us.save_pretrained(tmp_path / "ours")
    them.save_pretrained(str(tmp_path / "theirs"))
    again = trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "ours", is_trainable=True).train()
    back = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "theirs"), is_trainable=True).train()
    for model in (us, again, them, back):
        model(input_ids=ids.flip(0)[:1] + 1)
    mine = [trimtab.get_peft_model_state_dict(m)[key] for m in (us, again)]
    those = [peft.get_peft_model_state_dict(m)[key] for m in (them, back)]
    assert torch.equal(*mine) and torch.equal(mine[0], those[0]) and (those[0] - those[1]).abs().max() > 0.01


def test_kasa_s_penalty_is_peft_s() -> None:
    us, them = pair("kasa", r=4, kasa_config={"beta": 0.3, "gamma": 0.7})
    with torch.no_grad():
        want = task(us) + them.base_model._get_kasa_loss()
        loss = us(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss  # it is in the loss by itself
    close(loss, want, 1e-4)
    same_gradients(us, them, [us.get_base_model().trimtab_groups["default"].penalty(), them.base_model._get_kasa_loss()])


def test_kasa_leaves_the_weights_where_peft_changes_them_for_good() -> None:
    us, them = pair("kasa", **KASA)
    want = logits(base("llama"), "llama")
    us.eval(), them.eval()
    close(logits(us, "llama"), logits(them, "llama"), 1e-4)
    with us.disable_adapter(), them.disable_adapter():
        close(logits(us, "llama"), want, 0)
        assert (logits(them, "llama") - want).abs().max() > 0.1
    ours, theirs = configs("kasa", "llama", target_modules=["q_proj", "v_proj"], r=12, kasa_config={})
    before = logits(us, "llama")
    us.add_adapter("second", ours)
    them.add_adapter("second", theirs)
    close(logits(us, "llama"), before, 0)
    assert (logits(them, "llama") - before).abs().max() > 0.1
    close(logits(us.unload(), "llama"), want, 0)


def draws(us: Any, them: Any) -> None:
    """The same noise for both: theirs is read where ours is drawn. Of n draws with weights p, |p| Z is the sum where each is
    Z p_n / |p|; theirs are set so."""
    draw = torch.Generator().manual_seed(4)
    for path, adapter in adapters(us):
        sampler = adapter.lora_monteclora_sampler
        r, n = len(sampler.std_prior), len(sampler.expert_weights_prior)
        A = adapter.lora.lora_A.weight
        x, z, Z = (torch.randn(s, generator=draw) for s in ((r, r), (n,), (r, A.shape[1])))
        sampler.chi, sampler.z = x.square().sum(0), z
        p = sampler.p().detach()
        theirs = them.base_model.model.get_submodule(path).lora_monteclora_sampler["default"].sampler
        mvn = Z.T * (p / p.norm())[:, None, None]  # (n, in, r)
        theirs.buffer, theirs.index = [{"z_mvn": mvn, "z_wishart": x.T @ x, "z_dirichlet": z}] * 9, 0
        noise = sampler.cfg.sample_scaler * Z

        def noisy(A: Tensor, sampler: Any = sampler, noise: Tensor = noise) -> Tensor:
            return A + sampler.p().detach().norm() * sampler.v().sqrt()[:, None] * noise

        sampler.forward = noisy


def test_monteclora_s_noise_is_peft_s() -> None:
    """With the weights of the draws held, for which the two ways of drawing give other gradients of the same mean."""
    us, them = pair("monteclora", **MONTE)
    draws(us, them)
    for _, adapter in adapters(us):
        adapter.lora_monteclora_sampler.expert_weights_prior.requires_grad_(False)
    losses = [task(us), task(them)]
    with torch.no_grad():
        assert abs(losses[0] - task(us.eval())) > 1e-3  # the noise does something
    us.train()
    close(*losses, bound=1e-5)
    for loss in losses:
        loss.backward()
    for path, adapter in adapters(us):
        theirs = them.base_model.model.get_submodule(path)
        own = adapter.lora_monteclora_sampler.std_prior.grad
        close(adapter.lora.lora_A.weight.grad, theirs.lora_A["default"].weight.grad)
        close(adapter.lora.lora_B.weight.grad, theirs.lora_B["default"].weight.grad)
        close(own, theirs.lora_monteclora_sampler["default"].std_prior.grad)
        assert own.abs().max() > 1e-6


def test_monteclora_draws_as_peft_does() -> None:
    """Means and variances of 1,500 draws of the noise, of v and of the weights."""
    torch.manual_seed(0)
    us, them = pair("monteclora", r=4, monteclora_config={"num_samples": 3, "sample_scaler": 1.0, "buffer_size": 50})
    (path, adapter), *_ = adapters(us)
    ours = adapter.lora_monteclora_sampler
    theirs = them.base_model.model.get_submodule(path).lora_monteclora_sampler["default"]
    A, found = torch.zeros(4, 32), {"ours": [], "theirs": []}
    with torch.no_grad():
        for _ in range(1500):
            noise = ours(A)
            found["ours"].append(torch.cat([noise.square().mean(1), ours.v(), ours.p(), ours.gaussian_var_prior.diag()]))
            noises, p = theirs()
            noise = torch.einsum("n,nij->ji", p, noises)
            v = theirs.gaussian_var_prior.diag()
            found["theirs"].append(torch.cat([noise.square().mean(1), v, p, v]))
    for statistic in (torch.mean, torch.std):
        a, b = (statistic(torch.stack(rows), 0) for rows in found.values())
        assert ((a - b).abs() / b).max() < 0.15, (a, b)


def test_a_dirichlet_divergence_is_one_where_peft_s_has_a_sign_turned() -> None:
    us, them = pair("monteclora", **MONTE)
    draws(us, them)
    torch.manual_seed(0)
    task(us), task(them)
    prior, weight = Dirichlet(torch.full((3,), 0.1)), 0.2
    want = them.base_model._get_monteclora_loss()
    for path, _ in adapters(us):
        theirs = them.base_model.model.get_submodule(path).lora_monteclora_sampler["default"]
        a = theirs.expert_weights_prior.exp()
        want = want + weight * (kl_divergence(Dirichlet(a), prior) - theirs.dirichlet_kl(a)) / 4
    loss = us.get_base_model().trimtab_groups["default"].penalty()
    close(loss, want, 1e-4)
    near = prior.concentration * torch.tensor([1.05, 1.05, 1.0])  # beside the prior: a divergence is small and not negative
    assert 0 <= kl_divergence(Dirichlet(near), prior) < 0.01 and theirs.dirichlet_kl(near) < -0.05
    same_gradients_of_scale(us, them)


def same_gradients_of_scale(us: Any, them: Any) -> None:
    us.get_base_model().trimtab_groups["default"].penalty().backward()
    them.base_model._get_monteclora_loss().backward()
    for path, adapter in adapters(us):
        theirs = them.base_model.model.get_submodule(path).lora_monteclora_sampler["default"]
        close(adapter.lora_monteclora_sampler.std_prior.grad, theirs.std_prior.grad, 1e-4)


def test_entropy_is_the_sum_of_squares_of_the_weights() -> None:
    us, them = pair("monteclora", r=4, monteclora_config={"num_samples": 3, "use_entropy": True, "kl_loss_weight": 0.0})
    draws(us, them)
    task(them)
    close(us.get_base_model().trimtab_groups["default"].penalty(), them.base_model._get_monteclora_loss(), 1e-6)
    assert all(isinstance(a.lora_monteclora_sampler, Sampler) for _, a in adapters(us))


def by_hand(model: Any, config: Any) -> Any:
    """peft's QALoRA on plain layers. It is for GPTQ layers there; on others the option is ignored."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_variant["default"] = variant = QALoraLinearVariant()
            variant.init(module, "default", config)
    return model


@pytest.mark.parametrize("options", [{"qalora_group_size": 4}, {"qalora_group_size": 16, "lora_alpha": 3, "r": 4}], ids=str)
def test_exchange_of_qalora(options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = configs("qalora", "llama", use_qalora=True, **options)
    them = by_hand(quiet_peft(base("llama"), copy.deepcopy(theirs)), theirs)
    move(them)
    us = trimtab.get_peft_model(base("llama"), ours).eval()
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    close(logits(us, "llama"), logits(them, "llama"))
    same_gradients(us, them, [task(us), task(them)])
    us.save_pretrained(tmp_path / "ours")
    them.save_pretrained(str(tmp_path / "theirs"))
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    same_settings(tmp_path / "ours", tmp_path / "theirs")
    read = trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "theirs")
    close(logits(read, "llama"), logits(them, "llama"))
    back = by_hand(quiet_peft(base("llama"), copy.deepcopy(theirs)), theirs)
    peft.set_peft_model_state_dict(back, peft.load_peft_weights(str(tmp_path / "ours"), device="cpu"))
    close(logits(us, "llama"), logits(back, "llama"))


def test_qalora_on_plain_layers_is_qalora_where_peft_makes_a_lora_that_says_it_is_one(tmp_path: Path) -> None:
    ours, theirs = configs("qalora", "llama", use_qalora=True, qalora_group_size=4)
    them = quiet_peft(base("llama"), theirs)
    move(them)
    them.save_pretrained(str(tmp_path))
    shapes = {k.split(".")[-2]: s for k, s in keys(tmp_path).items()}
    assert shapes["lora_A"] == (8, 32)
    with pytest.raises(BadCheckpoint, match=r"lora_A.weight \(8, 32\) instead of \(8, 8\)"):
        trimtab.PeftModel.from_pretrained(base("llama"), tmp_path)
    plain = configs("lora", "llama")[0]
    close(logits(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path, config=plain), "llama"), logits(them, "llama"))
    assert trimtab.get_peft_model(base("llama"), ours).peft_config["default"].use_qalora


class Host(nn.Module):
    is_loaded_in_4bit = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("method", "options", "tensor"),
    [
        ("kasa", KASA, "lora_diag"),
        ("monteclora", MONTE, "sampler"),
        ("bdlora", {"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 2}}, "lora_A"),
    ],
)
def test_variants_act_on_four_bit_layers_where_peft_makes_a_plain_lora(
    method: str, options: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    def make() -> nn.Module:
        torch.manual_seed(0)
        layer = Linear4bit(64, 32, compute_dtype=torch.float32)
        layer.weight = Params4bit(torch.randn(32, 64), requires_grad=False)._quantize("cpu")
        return Host(layer)

    ours, theirs = configs(method, "llama", target_modules=["layer"], **options)
    ours.task_type = theirs.task_type = None
    mine = trimtab.get_peft_model_state_dict(trimtab.get_peft_model(make(), ours))
    those = peft.get_peft_model_state_dict(quiet_peft(make(), theirs))
    assert {k.rpartition("layer.")[2] for k in those} == {"lora_A.weight", "lora_B.weight"}
    assert any(tensor in k for k in mine) and {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in those.items()}


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
def test_exchange_of_mica(model: str, tmp_path: Path) -> None:
    exchange(model, *configs("lora", model, init_lora_weights="mica", r=4, lora_alpha=24), tmp_path)


def test_exchange_of_mica_on_an_embedding(tmp_path: Path) -> None:
    exchange("gpt2", *configs("lora", "gpt2", init_lora_weights="mica", r=4, target_modules=["wte"]), tmp_path)


@pytest.mark.parametrize("names", [["c_attn", "c_proj"], ["wte"]], ids=str)
def test_mica_starts_and_trains_as_peft_s(names: list[str]) -> None:
    ours, theirs = configs("lora", "gpt2", init_lora_weights="mica", r=4, target_modules=names)
    us, them = trimtab.get_peft_model(base("gpt2"), ours), quiet_peft(base("gpt2"), theirs)
    mine, those = trimtab.get_peft_model_state_dict(us), peft.get_peft_model_state_dict(them)
    assert mine.keys() == those.keys()
    for k, v in mine.items():
        close(v, those[k], 1e-6)
    trained = {n.replace(".adapters.", ".").replace(".default", "") for n, p in us.named_parameters() if p.requires_grad}
    assert len(trained) == sum(p.requires_grad for p in them.parameters()) and all("_A" in n for n in trained)
    batch = inputs("gpt2") | {"labels": inputs("gpt2")["input_ids"]}
    same_gradients(us, them, [m(**batch).loss for m in (us, them)])


@pytest.mark.parametrize("switch", [{"use_dora": True}, {"kasa_config": {}}], ids=str)
def test_mica_goes_with_no_variant_as_with_peft(switch: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"mica' and {next(iter(switch))} do not go together"):
        configs("lora", "llama", init_lora_weights="mica", **switch)
    with pytest.raises(ValueError, match="variant combination"):
        quiet_peft(base("llama"), peft.LoraConfig(init_lora_weights="mica", **switch))

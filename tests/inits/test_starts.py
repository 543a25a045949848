"""What each initialisation promises by itself: its equation, its place, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab import (
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
    set_peft_model_state_dict,
)
from trimtab.errors import BadCheckpoint, ConfigError, NotSupported, TrainingError
from trimtab.inits._start import inits, without_data
from trimtab.methods.lora import LoRA


class Two(nn.Module):
    """Two layers on one input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(12, 16, bias=False), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x) + self.b(x)))


def lora(name: Any, **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["a", "b", "c"], "init_lora_weights": name} | more)


def x(rows: int = 40, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=draw) * torch.linspace(2, 0.1, 12)


def prepared(name: str, **more: Any) -> tuple[nn.Module, LoraConfig]:
    model, cfg = Two(), lora(name, **more)
    if name == "corda":
        preprocess_corda(model, cfg, lambda: model(x()))
    if name == "lora_ga":
        preprocess_loraga(model, cfg, lambda: model(x()).square().sum().backward())
    return model, cfg


def parts(model: nn.Module) -> list[LoRA]:
    return [m for m in model.modules() if isinstance(m, LoRA)]


def move(model: nn.Module, size: float = 0.1) -> None:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=draw).to(p))


def test_each_file_is_an_initialisation_that_a_config_can_ask_for() -> None:
    assert {"corda", "eva", "gaussian", "loftq", "lora_ga", "olora", "orthogonal", "pissa"} <= set(inits())
    assert {"corda", "eva", "lora_ga"}.isdisjoint(without_data())
    for name in set(inits()) - {"kaiming", "uniform"}:
        assert lora(name).init_lora_weights == name


EACH: list[Any] = ["pissa", "pissa_niter_8", "olora", "corda", "lora_ga", "loftq", "orthogonal", "eva", "gaussian", True]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_starts_as_the_base_and_leaves_it_as_it_was(name: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, cfg = prepared(name)
    model = model.to(dtype)
    pristine, inputs = copy.deepcopy(model), x().to(dtype)
    adapted = get_peft_model(model, cfg)
    product = parts(adapted)[0]
    if name == "orthogonal":
        assert (adapted(inputs) - pristine(inputs)).abs().max() < 1e-2
    else:
        assert torch.equal(adapted(inputs), pristine(inputs))
    assert (name in (True, "gaussian", "eva")) == (product.lora_B.weight.abs().max() == 0)
    move(adapted)
    y = adapted(inputs)
    assert (y - pristine(inputs)).abs().max() > 1e-2
    assert all(torch.equal(p, dict(model.named_parameters())[f"{n.split('.')[0]}.base_layer.{n.split('.')[1]}"])
               for n, p in pristine.named_parameters())  # fmt: skip
    adapted.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)(inputs), y)
    adapted.merge_adapter()
    assert (adapted(inputs) - y).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(inputs), y)
    assert torch.equal(adapted.unload()(inputs), pristine(inputs))


def test_what_is_put_back_into_the_model_is_what_was_taken_out() -> None:
    model = get_peft_model(Two(), lora("pissa"))
    move(model)
    y, tensors = model(x()), get_peft_model_state_dict(model)
    assert tensors["base_model.model.a.lora_A.weight"].shape == (8, 12)
    move(model)
    assert (model(x()) - y).abs().max() > 1e-2
    set_peft_model_state_dict(model, tensors)
    assert (model(x()) - y).abs().max() < 1e-5
    A, B = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((8, 12), (16, 8)))
    tensors |= {"base_model.model.a.lora_A.weight": A, "base_model.model.a.lora_B.weight": B}  # of another start
    set_peft_model_state_dict(model, tensors)
    layer: Any = model.get_base_model().a  # type: ignore[union-attr]
    change = layer.stack_.weight() - layer.base_layer.weight
    assert (change - parts(model)[0].s * B @ A).abs().max() < 1e-4


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 12), (True, 6 * 2**0.5)])
def test_the_file_is_a_plain_lora_of_the_same_scale(rslora: bool, alpha: float, tmp_path: Path) -> None:
    cfg = lora("pissa", use_rslora=rslora, rank_pattern={"c": 2}, alpha_pattern={"b": 3})
    model = get_peft_model(Two(), cfg)
    move(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Two(), tmp_path)
    there: Any = again.peft_config["default"]
    assert (there.r, there.lora_alpha, there.rank_pattern, there.init_lora_weights) == (8, alpha, {"c": 4}, True)
    assert [round(p.s, 12) for p in parts(again)] == [round(p.s, 12) for p in parts(model)]
    assert (cfg.r, cfg.init_lora_weights) == (4, "pissa")
    assert (again(x()) - model(x())).abs().max() < 1e-5


def test_16_bit_files_keep_what_was_learnt() -> None:
    """[B, -B0] [A; A0] loses a small step in bfloat16, where two products of the size of the weight cancel."""
    model = get_peft_model(Two(), lora("pissa"))
    part = parts(model)[0]
    move(model, 1e-3)
    A, B, A0, B0 = part.lora_A.weight, part.lora_B.weight, part.start_A, part.start_B
    assert A0 is not None and B0 is not None
    want = B.double() @ A.double() - B0.double() @ A0.double()
    ours = [f.bfloat16().double() for f in part.factors()]
    usual = [torch.cat([A, A0]).bfloat16().double(), torch.cat([B, -B0], 1).bfloat16().double()]
    errors = [(b @ a - want).norm() / want.norm() for a, b in (ours, usual)]
    assert errors[0] < 0.01 and errors[1] > 0.2


def test_pissa_is_the_principal_part_and_olora_the_first_columns() -> None:
    for name in ("pissa", "pissa_niter_400", "olora"):
        part, w = parts(get_peft_model(Two(), lora(name)))[0], Two().a.weight.detach()
        B, A = part.lora_B.weight.detach(), part.lora_A.weight.detach()
        U, S, Vh = torch.linalg.svd(w)
        Q, R = torch.linalg.qr(w)
        want = Q[:, :4] @ R[:4] if name == "olora" else U[:, :4] * S[:4] @ Vh[:4]
        product = B @ A * (1 if name == "olora" else part.s)  # OLoRA takes the factors as they are
        assert (product - want).abs().max() < 1e-4, name


def test_orthogonal_factors_multiply_to_nothing() -> None:
    part = parts(get_peft_model(Two(), lora("orthogonal")))[0]
    A, B = part.lora_A.weight, part.lora_B.weight
    assert (B @ A).abs().max() < 1e-6 < min(A.abs().max(), B.abs().max())


def test_corda_trains_what_the_examples_use() -> None:
    """ipm keeps more of the output on such inputs in its r components than a plain decomposition, kpm the least."""
    kept = {}
    for method in ("ipm", "kpm"):
        part = parts(get_peft_model(*prepared("corda", corda_config={"corda_method": method})))[0]
        kept[method] = (x() @ (part.s * part.lora_B.weight @ part.lora_A.weight).T).norm().item()
    plain = parts(get_peft_model(Two(), lora("pissa")))[0]
    whole = (x() @ Two().a.weight.T).norm().item()
    rest = {"pissa": (x() @ (Two().a.weight - plain.s * plain.lora_B.weight @ plain.lora_A.weight).T).norm().item()}
    assert kept["kpm"] < 0.5 * kept["ipm"] <= whole * 1.01 and rest["pissa"] > 0


def test_lora_ga_steps_where_full_training_would() -> None:
    """The first step moves the weight along the r leading directions of its gradient on both sides."""
    model, cfg = prepared("lora_ga", r=2, target_modules=["c"])
    full = Two()
    full(x()).square().sum().backward()
    assert full.c.weight.grad is not None
    U, _, Vh = torch.linalg.svd(full.c.weight.grad)
    part = parts(get_peft_model(model, cfg))[0]
    A, B = part.lora_A.weight.detach(), part.lora_B.weight.detach()
    assert ((A @ Vh.T)[:, 2:]).abs().max() < 1e-4 and (U.T @ B)[:2].abs().max() < 1e-4 < B.abs().max()


def test_a_gradient_is_found_on_quantised_layers_and_nothing_is_left_behind() -> None:
    from bitsandbytes.nn import Linear4bit

    model = Two()
    model.c = Linear4bit(16, 10, compute_dtype=torch.float32).requires_grad_(False)  # type: ignore[assignment]
    model.c.weight = model.c.weight._quantize("cpu")  # type: ignore[operator]
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    cfg = lora("lora_ga")
    preprocess_loraga(model, cfg, lambda: model(x()).square().sum().backward())
    assert wanted == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())
    want = model(x())
    adapted = get_peft_model(model, cfg)
    assert torch.equal(adapted(x()), want) and parts(adapted)[2].lora_A.weight.abs().max() > 0.1


def test_caches_are_written_and_read(tmp_path: Path) -> None:
    files = {"cache_file": str(tmp_path / "c" / "cache.pt"), "covariance_file": str(tmp_path / "c" / "cov.pt")}
    first = parts(get_peft_model(*prepared("corda", corda_config=files)))[0].lora_A.weight
    for use in (files, {"covariance_file": files["covariance_file"]}):
        model, cfg = Two(), lora("corda", corda_config=use)
        preprocess_corda(model, cfg)
        assert torch.equal(parts(get_peft_model(model, cfg))[0].lora_A.weight, first)
    with pytest.raises(ConfigError, match=r"has no 'b\.eigens"):
        torch.save({k: v for k, v in torch.load(files["cache_file"]).items() if not k.startswith("b")}, files["cache_file"])
        preprocess_corda(Two(), lora("corda", corda_config=files))
    for _ in range(2):
        model, cfg = Two(), lora("lora_ga")
        preprocess_loraga(model, cfg, lambda model=model: model(x()).sum().backward(), str(tmp_path / "ga.pt"))
        again = parts(get_peft_model(model, cfg))[0].lora_A.weight
        first = again if _ == 0 else first
    assert torch.equal(first, again)


def eva(model: nn.Module, data: list[Tensor], **own: Any) -> Any:
    cfg = lora("eva", eva_config=own)
    adapted = get_peft_model(model, cfg)
    plain: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    initialize_lora_eva_weights(adapted, data, forward_fn=lambda m, b: m(b), **plain)
    return adapted


def test_eva_is_the_principal_components_of_the_inputs() -> None:
    data = [x(30, seed) for seed in range(4)]
    adapted = eva(Two(), data, rho=1.0, tau=1.0)
    rows = torch.cat(data)
    V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:4]
    for part in parts(adapted)[:2]:  # both have this input
        found = torch.cosine_similarity(part.lora_A.weight, V).abs()  # batch by batch, the last ones are near
        assert found[:3].min() > 0.99 and found[3] > 0.7
    for part in parts(eva(Two(), [rows], rho=1.0))[:2]:
        assert torch.cosine_similarity(part.lora_A.weight, V).abs().min() > 0.9999
    assert torch.equal(adapted(x()), Two()(x())) and all(p.requires_grad for p in parts(adapted)[0].parameters())


def test_eva_puts_ranks_where_they_explain_most_and_the_file_says_so(tmp_path: Path) -> None:
    data = [torch.cat([x(30, 1)[:, :1], 1e-4 * torch.randn(30, 11)], 1)]  # one direction is all there is at a and b
    adapted = eva(Two(), data, rho=2.0)
    cfg = adapted.peft_config["default"]
    ranks = {p.lora_A.weight.shape[0] for p in parts(adapted)}
    assert sum(p.lora_A.weight.shape[0] for p in parts(adapted)) <= 12 and ranks != {4}
    assert all(abs(p.s - 1.5) < 1e-9 for p in parts(adapted))  # lora_alpha goes with the rank
    move(adapted)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Two(), tmp_path)
    assert torch.equal(again(x()), adapted(x()))
    assert again.peft_config["default"].rank_pattern == cfg.rank_pattern != {}  # type: ignore[attr-defined]


def test_a_layer_that_explains_nothing_gets_no_adapter() -> None:
    found = {"base_model.model.a": torch.eye(12)[:8], "base_model.model.b": torch.zeros(0, 12), "c": torch.eye(16)[:4]}
    adapted = get_peft_model(Two(), lora("eva"))
    initialize_lora_eva_weights(adapted, eva_state_dict=found)
    assert [p.lora_A.weight.shape[0] for p in parts(adapted)] == [8, 4]
    cfg: Any = adapted.peft_config["default"]
    assert cfg.target_modules == ["a", "c"] and cfg.rank_pattern == {"a": 8} and cfg.alpha_pattern == {"a": 12.0}
    assert type(adapted.get_base_model().b) is nn.Linear  # type: ignore[union-attr]


def test_loftq_takes_off_what_quantisation_takes() -> None:
    """The frozen rest, W - s B A, is moved less by quantisation than W, and less again after more turns."""
    from trimtab.inits.loftq import _rounded

    def loss(bits: int, turns: int) -> float:
        cfg = lora("loftq", target_modules=["0"], loftq_config={"loftq_bits": bits, "loftq_iter": turns})
        model = get_peft_model(nn.Sequential(wide()), cfg)
        part, w = parts(model)[0], wide().weight.detach()
        product = part.s * part.lora_B.weight @ part.lora_A.weight
        return (w - _rounded(w - product, bits) - product).norm().item()

    for bits in (4, 8):
        plain = (wide().weight - _rounded(wide().weight, bits)).norm().item()
        assert loss(bits, 5) < loss(bits, 1) < plain


def test_a_file_for_a_base_that_loftq_quantised_says_where_it_belongs(tmp_path: Path) -> None:
    get_peft_model(Two(), lora(False)).save_pretrained(tmp_path)  # as peft writes them: A, B and the name of the init
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text()) | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    file.write_text(json.dumps(told))
    with pytest.raises(BadCheckpoint, match="load the model in 4 bits"):
        PeftModel.from_pretrained(Two(), tmp_path)


def wide() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(64, 64)


def quantised(path: Path) -> nn.Module:
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import save_file

    dense = wide()
    save_file({"0.weight": dense.weight.detach()}, path / "model.safetensors")
    layer = Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").requires_grad_(False)
    layer.load_state_dict(dense.state_dict())
    layer.weight = layer.weight._quantize("cpu") if layer.weight.quant_state is None else layer.weight  # type: ignore[operator]
    return nn.Sequential(layer)


def test_on_a_quantised_layer_the_published_weight_is_read(tmp_path: Path) -> None:
    inputs = torch.randn(20, 64, generator=torch.Generator().manual_seed(4))
    want, model = wide()(inputs), quantised(tmp_path)
    before = (model(inputs) - want).norm()
    with pytest.raises(NotSupported, match="replace_lora_weights_loftq"):
        get_peft_model(quantised(tmp_path), lora("loftq", target_modules=["0"]))
    adapted = get_peft_model(model, lora(True, target_modules=["0"]))
    replace_lora_weights_loftq(adapted, tmp_path)
    after = (adapted(inputs) - want).norm()
    assert after < 0.95 * before
    replace_lora_weights_loftq(adapted, tmp_path / "model.safetensors", callback=lambda model, name: name != "0")
    assert torch.equal((adapted(inputs) - want).norm(), after)
    adapted.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(quantised(tmp_path), tmp_path / "out")
    assert torch.equal(again(inputs), adapted(inputs))
    with pytest.raises(BadCheckpoint, match="no model folder"):
        replace_lora_weights_loftq(adapted, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="quantised layers"):
        replace_lora_weights_loftq(get_peft_model(Two(), lora(True)), tmp_path)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"init_lora_weights": "pisa"}, ConfigError, "Did you mean 'pissa'"),
        ({"init_lora_weights": "pissa_16"}, ConfigError, "'pissa_niter_16'"),
        ({"init_lora_weights": "olora_2"}, ConfigError, "nothing goes behind the name"),
        ({"init_lora_weights": "orthogonal", "r": 3}, ConfigError, "r=3 must be even"),
        ({"init_lora_weights": "eva", "eva_config": {"rh": 2}}, ConfigError, "Did you mean 'rho'"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, ConfigError, "rho=0.5"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "x"}}, ConfigError, "corda_method='x'"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "AB"}}, ConfigError, "direction='AB'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, ConfigError, "loftq_bits=3"),
        ({"init_lora_weights": "pissa", "r": 13}, ConfigError, "has 12 components"),
        ({"init_lora_weights": "corda"}, ConfigError, "call preprocess_corda"),
        ({"init_lora_weights": "lora_ga"}, ConfigError, "call preprocess_loraga"),
        ({"init_lora_weights": "lora_ga", "r": 7}, ConfigError, "has 6 components"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_said_before_anything_is_changed(given: dict[str, Any], error: Any, message: str) -> None:
    model = Two()
    with pytest.raises(error, match=message):
        get_peft_model(model, lora(**{"name": True} | {"name": given.pop("init_lora_weights")} | given))
    assert type(model.a) is nn.Linear


def test_calibration_that_sees_nothing_is_an_error() -> None:
    model = Two()
    with pytest.raises(TrainingError, match="no gradient came to 'a'"):
        preprocess_loraga(model, lora("lora_ga"), lambda: model(x()))
    with pytest.raises(TrainingError, match="saw no input"):
        preprocess_corda(model, lora("corda"), lambda: None)
    with pytest.raises(ConfigError, match="run_model is needed"):
        preprocess_corda(model, lora("corda"))
    with pytest.raises(TrainingError, match="no batch has an input for 'a'"):
        get_eva_state_dict(model, [], lora("eva"))
    with pytest.raises(ConfigError, match="init_lora_weights='eva'"):
        initialize_lora_eva_weights(get_peft_model(Two(), lora(True)), [])

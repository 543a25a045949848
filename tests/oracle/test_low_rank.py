"""The methods with low-rank and structured updates, on models and on single layers: peft's adapters in our hands and ours
in peft's."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants
from theirs import base, close, configs, exchange, inputs, keys, logits, quiet_peft, same_settings, settings
from torch import Tensor, nn

import trimtab
from trimtab.core.config import load
from trimtab.errors import BadCheckpoint, ConfigError, NotSupported, TrimtabWarning
from trimtab.methods._clusters import clusters
from trimtab.methods.peanut import _ACTIVATIONS
from trimtab.targets import TARGETS

show = lambda v: "-".join(f"{k}={x}" for k, x in v.items()) or "plain" if isinstance(v, dict) else str(v)  # noqa: E731


class Host(nn.Module):
    """A model that is one layer, and something frozen beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (2, 3, 12)),
    "wide": (lambda: nn.Linear(8, 20, bias=False), (3, 8)),
    "embedding": (lambda: nn.Embedding(11, 8), ()),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, dilation=2), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 8, 7)),
    "conv1d-plain": (lambda: nn.Conv1d(8, 12, 3), (2, 8, 9)),
    "conv2d-plain": (lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 4, 8, 7)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 8, 1, bias=False), (2, 4, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, stride=(1, 2, 1)), (2, 4, 4, 5, 4)),
}


def host(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Host(LAYERS[name][0]()).eval()


def answer(model: Any, name: str) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    shape = LAYERS[name][1]
    x = torch.randn(shape, generator=draw) if shape else torch.randint(0, 11, (2, 5), generator=draw)
    with torch.no_grad():
        return model.eval()(x)


def pair(method: str, **options: Any) -> tuple[Any, Any]:
    """The same config, ours and theirs, for a model that is one layer."""
    ours, theirs = configs(method, "llama", target_modules=["layer"], **options)
    ours.task_type = theirs.task_type = None
    return ours, theirs


def swap(layer: str, method: str, folder: Path, options: dict[str, Any], **more: Any) -> Any:
    return exchange(layer, *pair(method, **options), folder, make=host, answer=answer, **more)


MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("hira", {"r": 8}, "llama bert t5"),
    ("hira", {"r": 8, "fan_in_fan_out": True}, "gpt2"),
    ("hira", {"r": 8, "init_weights": "gaussian", "hira_dropout": 0.5}, "llama"),
    ("delora", {}, "llama bert t5"),
    ("delora", {"r": 4, "delora_lambda": 3, "lambda_pattern": {"q_proj": 7.0}, "rank_pattern": {"v_proj": 6}}, "llama"),
    ("loha", {"r": 4, "alpha": 2}, "llama bert t5"),
    ("loha", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, "llama"),
    ("lokr", {"r": 2}, "llama bert t5"),
    ("lokr", {"r": 1, "decompose_both": True, "alpha": 3}, "llama"),
    ("lokr", {"r": 64, "decompose_factor": 4}, "llama"),
    ("lokr", {"init_weights": "lycoris"}, "bert"),
]
MODELS += [
    ("gralora", {"r": 4, "hybrid_r": 2, "alpha": 8}, "llama gpt2 bert t5"),
    ("gralora", {"r": 8, "gralora_k": 4}, "llama"),
    ("peanut", {"r": 4, "depth": 2, "scaling": 0.7}, "llama bert t5"),
    ("peanut", {"r": 4, "act_fn": "gelu_new"}, "llama"),
    ("deft", {"r": 4, "alpha": 6}, "llama gpt2 bert t5"),
    ("deft", {"r": 4, "decomposition_method": "qr", "deft_dropout": 0.5}, "llama bert"),
    ("deft", {"r": 4, "para": True}, "llama bert"),
    ("deft", {"r": 64, "decomposition_method": "qr", "para": True}, "llama"),
]
MODELS += [
    ("vblora", {"num_vectors": 20, "vector_length": 8, "topk": 3}, "llama gpt2 bert t5"),
    ("vblora", {"num_vectors": 300, "vector_length": 8, "save_only_topk_weights": True}, "llama bert"),
    ("unilora", {"theta_d_length": 64}, "llama gpt2 bert t5"),
    ("unilora", {"theta_d_length": 64, "save_indices": True, "proj_seed": 7}, "llama"),
    ("unilora", {"theta_d_length": 100_000}, "llama"),  # more than are needed
    ("tinylora", {}, "llama gpt2 bert t5"),
    ("tinylora", {"u": 8, "r": 4, "weight_tying": 0.5, "init_weights": "uniform"}, "llama bert"),
    ("tinylora", {"weight_tying": 1.0, "save_projection": False, "projection_seed": 3}, "llama"),
    ("pvera", {"r": 8}, "llama gpt2 bert t5"),
    ("pvera", {"r": 8, "save_projection": False, "projection_prng_key": 3, "d_initial": 0.5}, "llama"),
    ("randlora", {"r": 8, "save_projection": False}, "llama"),
    ("randlora", {"r": 5, "save_projection": False, "sparse": True, "randlora_alpha": 20}, "llama"),
    ("randlora", {"r": 5, "save_projection": False, "very_sparse": True, "randlora_alpha": 20}, "bert"),
    ("frod", {"sparse_rate": 0.05, "progressbar": False}, "llama gpt2 bert t5"),
    ("frod", {"sparse_rate": 0.05, "progressbar": False, "save_projection": False, "projection_prng_key": 2}, "llama"),
    ("lily", {"r": 4}, "llama bert t5"),
    ("lily", {"r": 4, "num_B": 3, "stride_A": 2, "scaling": 0.5}, "llama bert"),
]
BUDGET: dict[str, Any] = {"total_step": 12, "init_r": 6, "target_r": 3}
MODELS += [
    ("adalora", {"init_r": 4, "total_step": 10, "target_r": 2, "lora_alpha": 6}, "llama gpt2 bert t5"),
    ("adalora", BUDGET | {"lora_alpha": 0, "init_lora_weights": False}, "llama"),
]
GLORA: list[tuple[str, dict[str, Any], str]] = [
    ("glora", {}, "linear wide"),
    ("glora", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, "linear wide"),
    ("glora", {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"}, "linear wide"),
    ("glora", {"config_A_B": "none", "config_C": "lora", "config_D_E": "none"}, "linear"),
]
LAYER: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"r": 4, "lora_alpha": 12}, "linear wide conv1d-plain conv2d-plain conv2d-1x1 conv2d-groups conv3d"),
    ("lora", {"r": 4, "lora_bias": True, "init_lora_weights": False, "use_rslora": True}, "wide conv2d-plain conv2d-groups"),
    ("dora", {"r": 4, "lora_alpha": 12}, "linear wide conv1d-plain conv2d-plain conv2d-1x1 conv3d"),
    ("tinylora", {"u": 5}, "linear wide embedding"),
    ("pvera", {"r": 4}, "linear wide"),
    ("frod", {"progressbar": False, "sparse_rate": 0.2}, "linear wide"),
    ("lily", {"r": 4}, "linear wide"),
    ("adalora", BUDGET, "linear conv2d conv2d-1x1"),
    ("hira", {"r": 4}, "linear embedding conv1d conv2d conv2d-1x1 conv3d"),
    ("delora", {"r": 4}, "linear wide"),
    ("loha", {"r": 3, "alpha": 2}, "linear wide conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("loha", {"r": 3, "use_effective_conv2d": True}, "linear conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("lokr", {"r": 1}, "linear wide conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("lokr", {"r": 8}, "linear wide conv1d conv2d conv2d-1x1 conv2d-groups"),
    ("lokr", {"r": 1, "use_effective_conv2d": True, "decompose_both": True}, "linear conv2d conv2d-groups"),
]


def spread(rows: list[tuple[str, dict[str, Any], str]]) -> list[tuple[str, dict[str, Any], str]]:
    return [(method, options, name) for method, options, names in rows for name in names.split()]


@pytest.mark.parametrize(("method", "options", "model"), spread(MODELS), ids=show)
def test_exchange_on_models(method: str, options: dict[str, Any], model: str, tmp_path: Path) -> None:
    exchange(model, *configs(method, model, **options), tmp_path)


@pytest.mark.parametrize(("method", "options", "layer"), spread(LAYER), ids=show)
def test_exchange_on_layers(method: str, options: dict[str, Any], layer: str, tmp_path: Path) -> None:
    swap(layer, method, tmp_path, options)


@pytest.mark.parametrize("method", sorted({m for m, _, _ in MODELS} | {"glora", "adamss"}))
def test_default_targets_are_peft_s(method: str) -> None:
    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method.upper()}_TARGET_MODULES_MAPPING")
    ours = load(method).adapter.targets or TARGETS  # type: ignore[attr-defined]
    lists = {k: sorted(v) for k, v in theirs.items() if not isinstance(v, str)}  # a regex names one model's layers
    assert {k: sorted(ours[k]) for k in lists} == lists


@pytest.mark.parametrize(("method", "options", "layer"), spread(GLORA), ids=show)
def test_exchange_of_glora(method: str, options: dict[str, Any], layer: str, tmp_path: Path) -> None:
    """peft writes a tensor of zeros for each path that is not there, in the size of the weight for A and B."""
    absent = layer == "wide" or "none" in options.values()
    swap(layer, method, tmp_path, options, **{"extra": r"\.zeros$"} if absent else {})


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
def test_exchange_of_randlora(model: str, tmp_path: Path) -> None:
    """peft writes what all layers share once more for each of them."""
    ours, theirs = configs("randlora", model, r=8, randlora_alpha=20)
    exchange(model, ours, theirs, tmp_path, extra=r"^base_model\.model\..*randlora_[AB]$")


def test_exchange_of_frod_without_sparse_entries(tmp_path: Path) -> None:
    """Where nothing is trained off the diagonal, peft writes a tensor without numbers."""
    swap("linear", "frod", tmp_path, {"progressbar": False, "sparse_rate": 0.0}, extra=r"frod_lambda_s_values$")


@pytest.mark.parametrize("layer", ["linear", "wide"])
@pytest.mark.parametrize("r", [5, 3])
def test_exchange_of_randlora_on_layers(layer: str, r: int, tmp_path: Path) -> None:
    swap(layer, "randlora", tmp_path, {"r": r}, extra=r"layer\.randlora_[AB]$")


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
def test_exchange_of_glora_on_models(model: str, tmp_path: Path) -> None:
    exchange(model, *configs("glora", model), tmp_path, **{} if model == "bert" else {"extra": r"\.zeros$"})


@pytest.mark.parametrize("name", sorted(_ACTIVATIONS))
def test_activations_are_those_of_their_name(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 101)
    close(_ACTIVATIONS[name](x), ACT2FN[name](x).detach(), 1e-6)


def test_hira_takes_its_rank_pattern_where_peft_ignores_it_on_the_first_adapter() -> None:
    ours, theirs = pair("hira", r=4, rank_pattern={"layer": 2})
    us, them = trimtab.get_peft_model(host("linear"), ours), quiet_peft(host("linear"), theirs)
    assert us.get_base_model().layer.hira_A["default"].shape == (2, 12)
    assert them.base_model.model.layer.hira_A["default"].shape == (4, 12)


def test_lokr_on_a_1d_convolution_takes_a_core_where_peft_fails() -> None:
    ours, theirs = pair("lokr", r=1, use_effective_conv2d=True)
    us = trimtab.get_peft_model(host("conv1d"), ours)
    close(answer(us, "conv1d"), answer(host("conv1d"), "conv1d"), 1e-6)
    with pytest.raises(RuntimeError):
        answer(quiet_peft(host("conv1d"), theirs), "conv1d")


def test_padding_of_a_convolution_is_the_layer_s_where_peft_s_loha_pads_with_zeros() -> None:
    LAYERS["circular"] = (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6))
    ours, theirs = pair("loha", r=3, init_weights=False)
    them = quiet_peft(host("circular"), theirs)
    us = trimtab.get_peft_model(host("circular"), ours)
    trimtab.set_peft_model_state_dict(us, peft_state(them))
    want = answer(us.merge_and_unload(), "circular")
    us = trimtab.get_peft_model(host("circular"), pair("loha", r=3)[0])
    trimtab.set_peft_model_state_dict(us, peft_state(them))
    close(answer(us, "circular"), want)
    assert (answer(them, "circular") - want).abs().max() > 1e-3
    close(answer(them.merge_and_unload(), "circular"), want)


def peft_state(model: Any) -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(model)


# -- budgets ----------------------------------------------------------------------------------------------------------
def train(model: Any, steps: int, name: str = "llama") -> list[Tensor]:
    """Steps of one's own loop; the budget is told of each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch, losses = inputs(name) | {"labels": inputs(name)["input_ids"]}, []
    for n in range(1, steps + 1):
        losses.append(model.train()(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        model.base_model.update_and_allocate(n)
        optimizer.zero_grad()
    return losses


def alike(method: str, **options: Any) -> tuple[Any, Any]:
    """Ours and theirs on a Llama, with the same numbers in them."""
    ours, theirs = configs(method, "llama", target_modules=["q_proj", "v_proj", "down_proj"], **options)
    them = quiet_peft(base("llama"), theirs)
    us = trimtab.get_peft_model(base("llama"), ours)
    trimtab.set_peft_model_state_dict(us, peft_state(them))
    return us, them


@pytest.mark.parametrize(
    "options",
    [{}, {"tinit": 2, "tfinal": 3}, {"tinit": 1, "tfinal": 2, "deltaT": 3, "beta1": 0.5, "beta2": 0.9}],
    ids=show,
)
def test_adalora_takes_the_ranks_that_peft_takes(options: dict[str, Any], tmp_path: Path) -> None:
    us, them = alike("adalora", **BUDGET, **options)
    for a, b in zip(train(us, 12), train(them, 12), strict=True):
        close(a, b, 2e-5)  # the penalty is in the loss
    us.save_pretrained(tmp_path / "ours")
    them.save_pretrained(str(tmp_path / "theirs"))
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    same_settings(tmp_path / "ours", tmp_path / "theirs")
    pattern = settings(tmp_path / "ours")["rank_pattern"]
    ranks = [sum(kept) for kept in pattern.values()]
    assert sum(ranks) == 3 * len(ranks) == 18 and len(set(ranks)) > 1
    want = logits(us, "llama")
    close(want, logits(them, "llama"), 1e-4)
    for read, folder in ((trimtab.PeftModel, "ours"), (trimtab.PeftModel, "theirs"), (peft.PeftModel, "ours")):
        close(logits(read.from_pretrained(base("llama"), str(tmp_path / folder)), "llama"), want, 1e-4)


def test_adalora_may_take_all_ranks_of_a_layer(tmp_path: Path) -> None:
    us, them = alike("adalora", total_step=6, init_r=3, target_r=1)
    train(us, 6)
    train(them, 6)
    us.save_pretrained(tmp_path)
    ranks = [sum(kept) for kept in settings(tmp_path)["rank_pattern"].values()]
    assert sum(ranks) == 6 and 0 in ranks
    close(logits(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path), "llama"), logits(us, "llama"))
    close(logits(peft.PeftModel.from_pretrained(base("llama"), str(tmp_path)), "llama"), logits(us, "llama"))


def test_adalora_s_file_between_two_allocations_is_the_adapter_where_peft_leaves_ranks_out(tmp_path: Path) -> None:
    us, them = alike("adalora", **BUDGET, deltaT=3)
    for model, folder, read in ((us, "ours", trimtab.PeftModel), (them, "theirs", peft.PeftModel)):
        train(model, 5)  # ranks were taken after the third step
        model.save_pretrained(str(tmp_path / folder))
        again = logits(read.from_pretrained(base("llama"), str(tmp_path / folder)), "llama")
        same = (again - logits(model, "llama")).abs().max() < 1e-5
        assert same == (model is us)


def test_adalora_with_nothing_to_take_trains_where_peft_fails() -> None:
    us, them = alike("adalora", total_step=4, init_r=4, target_r=4)
    train(us, 4)
    with pytest.raises(RuntimeError, match="k out of range"):
        train(them, 4)


def test_adalora_evaluates_without_its_penalty_where_peft_adds_it() -> None:
    us, them = alike("adalora", **BUDGET)
    batch = inputs("llama") | {"labels": inputs("llama")["input_ids"]}
    plain = base("llama")(**batch).loss
    close(us.eval()(**batch).loss, plain)
    assert us.train()(**batch).loss > plain + 0.1 and them.eval()(**batch).loss > plain + 0.1


@pytest.mark.parametrize("field", [{"use_rslora": True}, {"alpha_pattern": {"layer": 3}}, {"lora_bias": True}], ids=show)
def test_adalora_refuses_options_of_lora_that_peft_ignores(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        pair("adalora", **BUDGET, **field)
    theirs = peft.AdaLoraConfig(target_modules=["layer"], **BUDGET, **field)
    layer = quiet_peft(host("linear"), theirs).base_model.model.layer
    assert layer.scaling["default"] == 8 and "lora_bias" not in dict(layer.named_parameters())


def test_adalora_on_a_convolution_with_groups_works_where_peft_fails() -> None:
    (ours, theirs), name = pair("adalora", **BUDGET), "conv2d-groups"
    close(answer(trimtab.get_peft_model(host(name), ours), name), answer(host(name), name))
    with pytest.raises(RuntimeError):
        answer(quiet_peft(host(name), theirs), name)


# -- AdaMSS: peft needs scikit-learn for it, of which one function is used ------------------------------------------------
@pytest.fixture
def scikit(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("sklearn") is None:
        package, module = types.ModuleType("sklearn"), types.ModuleType("sklearn.cluster")
        package.cluster, module.KMeans = module, KMeans  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sklearn", package)
        monkeypatch.setitem(sys.modules, "sklearn.cluster", module)


class KMeans:
    """In scikit-learn's place, where it is not installed; `test_clusters_are_scikit_learn_s` compares the two."""

    def __init__(self, n_clusters: int, **options: Any) -> None:
        self.n = n_clusters
        assert options == {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}

    def fit_predict(self, x: Any) -> Any:
        return clusters(torch.from_numpy(x), self.n).numpy()


def test_clusters_are_scikit_learn_s() -> None:
    i = torch.arange(240).double()
    got = clusters(torch.sin(i * i * 0.37 + i).view(40, 6), 5)  # below: what KMeans of scikit-learn 1.9.1 gives for it
    assert "".join(map(str, got.tolist())) == "0111244211300241401110210201202411100424"


ROWS = r"adamss_rows$"


@pytest.mark.usefixtures("scikit")
@pytest.mark.filterwarnings("ignore:.*clustered again")
@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
@pytest.mark.parametrize(
    "options",
    [{}, {"subspace_rank": 3, "random_seed": 4}, {"subspace_rank": 3, "use_dynamic_rank": True, "init_weights": None}],
    ids=show,
)
def test_exchange_of_adamss(options: dict[str, Any], model: str, tmp_path: Path) -> None:
    """Ours says which row is in which cluster, in a tensor more; peft leaves that to the next clustering."""
    exchange(model, *configs("adamss", model, r=8, num_subspaces=3, **options), tmp_path, extra=ROWS)
    with pytest.warns(TrimtabWarning, match="which rows are in which cluster"):
        trimtab.PeftModel.from_pretrained(base(model), tmp_path / "theirs")


def clustered_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine: two rows of different clusters have changed places."""

    def swapped(rows: Tensor, count: int) -> Tensor:
        found = clusters(rows, count)
        other = int((found != found[0]).nonzero()[0])
        found[[0, other]] = found[[other, 0]]
        return found

    monkeypatch.setattr("trimtab.methods._clusters.clusters", swapped)
    monkeypatch.setattr(sys.modules["sklearn.cluster"], "KMeans", Swapped)


class Swapped(KMeans):
    def fit_predict(self, x: Any) -> Any:
        import trimtab.methods._clusters as module

        return module.clusters(torch.from_numpy(x), self.n).numpy()


@pytest.mark.usefixtures("scikit")
def test_adamss_reads_its_file_where_clusters_come_out_otherwise_and_peft_moves_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair("adamss", r=4, num_subspaces=3, init_weights=None)
    us, them = trimtab.get_peft_model(host("linear"), ours), quiet_peft(host("linear"), theirs)
    for model, folder in ((us, "ours"), (them, "theirs")):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.mul_(50 if "adamss_B" in n else 1)
        model.save_pretrained(str(tmp_path / folder))
    clustered_otherwise(monkeypatch)
    close(answer(trimtab.PeftModel.from_pretrained(host("linear"), tmp_path / "ours"), "linear"), answer(us, "linear"))
    wrong = answer(peft.PeftModel.from_pretrained(host("linear"), str(tmp_path / "theirs")), "linear")
    assert (wrong - answer(them, "linear")).abs().max() > 1e-3


@pytest.mark.usefixtures("scikit")
def test_adamss_reads_its_file_where_clusters_have_other_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    us = trimtab.get_peft_model(host("linear"), pair("adamss", r=4, num_subspaces=3, init_weights=None)[0])
    us.save_pretrained(tmp_path)
    monkeypatch.setattr("trimtab.methods._clusters.clusters", lambda rows, n: torch.tensor([0, 1, 1, 1, 1, 1, 1, 2]))
    again = trimtab.PeftModel.from_pretrained(host("linear"), tmp_path)
    close(answer(again, "linear"), answer(us, "linear"), 0)


@pytest.mark.usefixtures("scikit")
@pytest.mark.filterwarnings("ignore:.*clustered again")
def test_adamss_trains_as_many_clusters_as_asked_and_peft_one_less() -> None:
    shared: dict[str, Any] = dict(r=8, num_subspaces=3, subspace_rank=2, use_asa=True)
    shared |= dict(init_warmup=1, final_warmup=4, mask_interval=4)
    us, them = alike("adamss", **shared, asa_target_subspaces=5)
    same, _ = alike("adamss", **shared, asa_target_subspaces=4)  # so it ranks the clusters of one run as peft's does
    trimtab.set_peft_model_state_dict(same, peft_state(them))
    for model in (us, same, them):
        train(model, 4)

    def live(model: Any) -> list[bool]:
        layers = model.get_base_model().trimtab_groups["default"].sites()
        return [on for _, a in layers for on in a.on.tolist()]

    theirs = [p.requires_grad for n, p in them.named_parameters() if "adamss_A" in n]
    assert (len(theirs), sum(theirs), sum(live(us))) == (18, 4, 5)
    assert live(same) == theirs


# -- what peft gets wrong ---------------------------------------------------------------------------------------------
def test_a_second_lily_shares_where_peft_s_does_not() -> None:
    ours, theirs = configs("lily", "llama", r=4, stride_A=2)
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    us.add_adapter("second", configs("lily", "llama", r=4, stride_A=2)[0])
    them.add_adapter("second", configs("lily", "llama", r=4, stride_A=2)[1])
    for name, shared in (("default", True), ("second", False)):
        models = us.get_base_model().model, them.base_model.model.model
        mine, those = ([m.layers[i].self_attn.q_proj for i in (0, 1)] for m in models)
        assert mine[0].lily_B[name] is mine[1].lily_B[name] and mine[0].lily_A[name] is mine[1].lily_A[name]
        assert (those[0].lily_B[name] is those[1].lily_B[name]) == shared


def test_lily_on_all_linear_layers_shares_by_name_where_peft_shares_nothing() -> None:
    ours, theirs = configs("lily", "llama", r=4, target_modules="all-linear")
    us = trimtab.get_peft_model(base("llama"), ours).get_base_model().model
    them = quiet_peft(base("llama"), theirs).base_model.model.model
    for model, shared in ((us, True), (them, False)):
        first, second = (model.layers[i].self_attn.q_proj.lily_B["default"] for i in (0, 1))
        assert (first is second) == shared
    assert us.layers[0].self_attn.o_proj.lily_B["default"] is not us.layers[0].self_attn.q_proj.lily_B["default"]


def test_a_lily_file_whose_layers_share_nothing_is_read_as_it_is(tmp_path: Path) -> None:
    them = quiet_peft(base("llama"), configs("lily", "llama", r=4)[1])
    them.add_adapter("second", configs("lily", "llama", r=4, init_weights=False)[1])
    them.base_model.set_adapter("second")
    them.save_pretrained(str(tmp_path))
    again = trimtab.PeftModel.from_pretrained(base("llama"), tmp_path, subfolder="second")
    close(logits(again, "llama"), logits(them, "llama"))
    assert (logits(again, "llama") - logits(base("llama"), "llama")).abs().max() > 1e-3
    again.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "second")


@pytest.mark.parametrize(("method", "error"), [("deft", RuntimeError), ("tinylora", RuntimeError)])
def test_a_second_adapter_on_transposed_layers_works_where_peft_s_fails(method: str, error: type[Exception]) -> None:
    ours, theirs = configs(method, "gpt2", r=2)
    us, them = trimtab.get_peft_model(base("gpt2"), ours), quiet_peft(base("gpt2"), theirs)
    us.add_adapter("second", configs(method, "gpt2", r=2)[0])
    us.set_adapter("second")
    close(logits(us, "gpt2"), logits(base("gpt2"), "gpt2"), 1e-4)
    with pytest.raises(error):
        them.add_adapter("second", configs(method, "gpt2", r=2)[1])
        them.base_model.set_adapter("second")
        logits(them, "gpt2")


def test_vblora_files_of_the_top_k_are_for_inference_where_peft_stops_in_the_first_step(tmp_path: Path) -> None:
    small: dict[str, Any] = dict(num_vectors=20, vector_length=8, save_only_topk_weights=True)
    quiet_peft(base("llama"), configs("vblora", "llama", **small)[1]).save_pretrained(str(tmp_path))
    with pytest.raises(NotSupported, match="inference"):
        trimtab.PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)
    them = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path), is_trainable=True).train()
    with pytest.raises(RuntimeError, match="infinity"):
        them(**inputs("llama"))


def test_tinylora_without_its_start_is_drawn_where_peft_takes_what_is_in_memory() -> None:
    drawn = [trimtab.get_peft_model(host("linear"), pair("tinylora", init_weights=False)[0]) for _ in range(2)]
    first, second = (m.get_base_model().trimtab_groups["default"].shared.tinylora_v[0] for m in drawn)
    assert torch.equal(first, second) and 0 < first.abs().max() <= 0.02


def test_a_randlora_file_whose_copies_differ_from_what_is_shared_is_refused(tmp_path: Path) -> None:
    them = quiet_peft(host("linear"), pair("randlora", r=3)[1])
    state = peft_state(them)
    odd = next(k for k in state if "layer.randlora_A" in k)
    us = trimtab.get_peft_model(host("linear"), pair("randlora", r=3)[0])
    trimtab.set_peft_model_state_dict(us, state)
    with pytest.raises(BadCheckpoint, match="randlora_A"):
        trimtab.set_peft_model_state_dict(us, state | {odd: state[odd] + 1})

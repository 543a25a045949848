"""Rotations, spectra, sparse and shared updates against peft: folders both ways, merged weights, and where we differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.waveft import wavelet as peft_wavelets
from safetensors.torch import load_file, save_file
from theirs import base, close, configs, exchange, inputs, logits, move, quiet_peft

import trimtab
from trimtab.core.config import config_for
from trimtab.methods._wavelets import low_pass

LINEAR = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"], "t5": ["q", "wo"]}
show = lambda v: "-".join(f"{k}={x}" for k, x in v.items()) or "plain" if isinstance(v, dict) else str(v)  # noqa: E731

EXCHANGED: list[tuple[str, str, dict[str, Any]]] = [  # method, models, options
    ("boft", "llama bert t5", {}),
    ("boft", "llama", {"boft_block_size": 0, "boft_block_num": 2, "target_modules": LINEAR["llama"]}),
    ("boft", "bert", {"boft_block_size": 8, "bias": "boft_only", "boft_dropout": 0.1}),
    ("hra", "llama bert t5", {}),
    ("hra", "llama", {"r": 5, "init_weights": False, "target_modules": LINEAR["llama"]}),
    ("hra", "bert", {"r": 4, "apply_GS": True, "init_weights": False, "bias": "hra_only"}),
    ("road", "bert t5", {"group_size": 8}),
    ("road", "llama", {"group_size": 8, "variant": "road_2", "target_modules": LINEAR["llama"]}),
    ("road", "bert", {"group_size": 4, "variant": "road_4", "target_modules": LINEAR["bert"]}),
    ("psoft", "bert t5", {"r": 8}),
    ("psoft", "llama", {"r": 8, "ab_svd_init": "pissa_init", "psoft_alpha": 5, "target_modules": LINEAR["llama"]}),
    ("psoft", "llama", {"r": 8, "psoft_svd": "lowrank", "random_seed": 3, "psoft_mag_a": False}),
    ("psoft", "llama", {"r": 8, "psoft_orth": False, "psoft_mag_b": False, "psoft_dropout": 0.5}),
    ("psoft", "llama", {"r": 8, "use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.5}),
    ("fourierft", "llama gpt2 bert", {"n_frequency": 100, "scaling": 30.0}),
    ("fourierft", "llama", {"n_frequency": 50, "init_weights": True, "n_frequency_pattern": {"v_proj": 20}}),
    ("fourierft", "bert", {"n_frequency": 60, "random_loc_seed": 3, "bias": "fourierft_only"}),
    ("waveft", "llama gpt2 bert", {"n_frequency": 200}),
    ("waveft", "llama", {"n_frequency": 200, "wavelet_family": "db4", "n_frequency_pattern": {"v_proj": 20}}),
    ("waveft", "llama", {"n_frequency": 90, "wavelet_family": "sym5", "proportional_parameters": True}),
    ("waveft", "bert", {"n_frequency": 90, "wavelet_family": "coif2", "random_loc_seed": 3, "bias": "waveft_only"}),
    ("waveft", "bert", {"n_frequency": 90, "use_idwt": False, "init_weights": False}),
    ("c3a", "llama bert t5", {"block_size": 8}),
    ("c3a", "llama", {"block_size": 16, "block_size_pattern": {"v_proj": 4}, "init_weights": "gaussian"}),
    ("c3a", "bert", {"block_size": 4, "init_weights": "kaiming_uniform", "bias": "c3a_only"}),
    ("c3a", "llama", {"block_size": 1, "init_weights": True, "target_modules": LINEAR["llama"]}),
    ("miss", "llama bert t5", {"r": 8}),
    ("miss", "llama", {"r": 7, "target_modules": LINEAR["llama"]}),
    ("miss", "llama", {"r": 8, "init_weights": False, "miss_dropout": 0.5}),
    ("miss", "llama", {"r": 8, "init_weights": "bat", "target_modules": LINEAR["llama"]}),
    ("miss", "bert", {"r": 5, "mini_r": 4, "init_weights": "mini", "bias": "miss_only"}),
    ("beft", "llama bert t5", {}),
    ("beft", "bert", {"target_modules": LINEAR["bert"], "init_weights": False}),
    ("shira", "llama bert t5", {"r": 4}),
    ("shira", "llama", {"r": 3, "random_seed": 3, "init_weights": False, "target_modules": LINEAR["llama"]}),
    ("supertuning", "llama bert t5", {}),
    ("supertuning", "llama", {"sparsity": 0.9, "r": 4, "lora_dropout": 0.5, "target_modules": LINEAR["llama"]}),
    ("supertuning", "llama", {"sparsity": 0.9, "select_top": False, "r": 4, "lora_alpha": 3.0}),
    ("supertuning", "llama", {"sparsity": 0.9, "save_precomputed_indices": False}),
    ("osf", "llama", {}),
    ("osf", "bert", {"effective_rank": 5, "target_modules": LINEAR["bert"]}),
    ("osf", "t5", {"effective_rank": 0.25, "target_modules": ["q", "wi"]}),
    ("osf", "llama", {"rank_pattern": {"v_proj": 3, r"layers\.1\.mlp\..*": 0.75}, "init_weights": False}),
]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's BOFT asks for a CUDA compiler at each layer."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@pytest.mark.parametrize(
    ("method", "model", "options"),
    [(method, model, options) for method, models, options in EXCHANGED for model in models.split()],
    ids=show,
)
def test_exchange(method: str, model: str, options: dict[str, Any], tmp_path: Path) -> None:
    exchange(model, *configs(method, model, **options), tmp_path)


MERGED: list[tuple[str, dict[str, Any]]] = [
    ("boft", {}),
    ("hra", {}),
    ("hra", {"r": 3, "apply_GS": True, "init_weights": False}),
    ("road", {"group_size": 8, "variant": "road_4"}),
    ("psoft", {"r": 8, "psoft_alpha": 4}),
    ("fourierft", {"n_frequency": 100}),
    ("waveft", {"n_frequency": 100, "wavelet_family": "db3"}),
    ("c3a", {"block_size": 8}),
    ("miss", {"r": 7}),
    ("miss", {"r": 8, "init_weights": "bat"}),
    ("miss", {"r": 8, "init_weights": "mini", "mini_r": 2}),
    ("shira", {"r": 4}),
    ("supertuning", {"sparsity": 0.9, "r": 2}),
    ("osf", {}),
]


@pytest.mark.parametrize(("method", "options"), MERGED, ids=show)
def test_merged_is_what_peft_merges(method: str, options: dict[str, Any]) -> None:
    ours, theirs = configs(method, "llama", **{"target_modules": LINEAR["llama"]} | options)
    them = quiet_peft(base("llama"), theirs)
    move(them)
    us = trimtab.get_peft_model(base("llama"), ours)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    a, b = us.merge_and_unload(), them.merge_and_unload().state_dict()
    assert a.state_dict().keys() == b.keys()
    for key, value in a.state_dict().items():
        close(value, b[key], 2e-6)


# -- BOFT -------------------------------------------------------------------------------------------------------------
def test_boft_has_the_factors_it_is_given_where_peft_without_a_compiler_has_one(tmp_path: Path) -> None:
    ours, theirs = configs("boft", "llama", target_modules=["q_proj"], boft_n_butterfly_factor=2)
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    key = "base_model.model.model.layers.0.self_attn.q_proj.boft_R"
    assert trimtab.get_peft_model_state_dict(us)[key].shape == (2, 8, 4, 4)
    assert peft.get_peft_model_state_dict(them)[key].shape == (1, 8, 4, 4)
    assert them.peft_config["default"].boft_n_butterfly_factor == 2


class BlockDiagonal:
    """What peft's CUDA extension computes, by torch."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def test_exchange_of_boft_with_two_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)
    for i, options in enumerate([{"boft_n_butterfly_factor": 2}, {"boft_n_butterfly_factor": 3, "boft_block_size": 2}]):
        exchange("llama", *configs("boft", "llama", **options), tmp_path / str(i))


def test_two_boft_adapters_keep_their_own_blocks_where_peft_mixes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft keeps one permutation a layer, that of the adapter which came last."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)
    first = configs("boft", "llama", target_modules=["q_proj"], boft_n_butterfly_factor=2)
    second = configs("boft", "llama", target_modules=["q_proj"], boft_n_butterfly_factor=2, boft_block_size=8)
    us, them = trimtab.get_peft_model(base("llama"), first[0]), quiet_peft(base("llama"), first[1])
    move(us)
    move(them)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    before = logits(us, "llama")
    close(before, logits(them, "llama"))
    us.add_adapter("second", second[0])
    them.add_adapter("second", second[1])
    them.base_model.set_adapter("default")
    close(logits(us, "llama"), before, 0)
    assert (logits(them, "llama") - before).abs().max() > 1e-3


# -- HRA --------------------------------------------------------------------------------------------------------------
def test_orthogonal_hyperplanes_start_apart_where_half_of_peft_s_are_rounding_noise() -> None:
    ours, theirs = configs("hra", "llama", target_modules=["q_proj"], apply_GS=True, r=4)
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    changes = []
    for model in (us, them):
        before = logits(model, "llama")
        move(model, 1e-6)
        changes.append((logits(model, "llama") - before).abs().max().item())
    assert changes[0] < 1e-4 and not changes[1] < 1e-2  # NaN, where rounding leaves nothing
    assert not any(a.starts_at_base for _, a in us.get_base_model().trimtab_groups["default"].sites())


# -- WaveFT -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wavelet", sorted(peft_wavelets._WAVELET_COEFFS))
def test_filters_are_peft_s_but_for_two_that_are_no_wavelets(wavelet: str) -> None:
    theirs = torch.tensor(peft_wavelets.Wavelet(wavelet).rec_lo, dtype=torch.float64)
    products = [(theirs[s:] * theirs[: len(theirs) - s]).sum().item() for s in range(2, len(theirs), 2)]
    if wavelet in ("coif4", "coif5"):
        assert max(map(abs, products)) > 0.005 and abs(theirs.sum().item() - 2**0.5) > 0.005
        with pytest.raises(trimtab.errors.ConfigError, match=wavelet):
            config_for("waveft", wavelet_family=wavelet)
    else:
        assert all(abs(p) < 1e-11 for p in products)
        close(low_pass(wavelet), theirs, 1e-11)


def test_long_wavelets_work_where_peft_fails_at_the_first_forward() -> None:
    ours, theirs = configs("waveft", "llama", target_modules=["q_proj"], n_frequency=50, wavelet_family="db12")
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    move(us)
    assert logits(us, "llama").isfinite().all()
    with pytest.raises(ValueError, match="Unknown wavelet"):
        logits(them, "llama")
    with pytest.raises(trimtab.errors.ConfigError, match="sym11"):
        config_for("waveft", wavelet_family="sym11")
    assert type(theirs)(wavelet_family="sym11").wavelet_family == "sym11"


# -- C3A --------------------------------------------------------------------------------------------------------------
def test_two_c3a_adapters_add_up_where_peft_feeds_one_to_the_other() -> None:
    """peft's merged weights are right, and are what ours give, merged or not."""
    pairs = [
        configs("c3a", "llama", target_modules=["q_proj"], block_size=8, init_weights="gaussian") for _ in range(2)
    ]
    us, them = trimtab.get_peft_model(base("llama"), pairs[0][0]), quiet_peft(base("llama"), pairs[0][1])
    us.add_adapter("second", pairs[1][0])
    them.add_adapter("second", pairs[1][1])
    for name in ("default", "second"):
        trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them, adapter_name=name), name)
    us.set_adapter(["default", "second"])
    them.base_model.set_adapter(["default", "second"])
    ours, theirs = logits(us, "llama"), logits(them, "llama")
    us.merge_adapter()
    them.merge_adapter()
    close(ours, logits(us, "llama"))
    close(ours, logits(them, "llama"))
    assert (ours - theirs).abs().max() > 1e-3


# -- MiSS -------------------------------------------------------------------------------------------------------------
def test_bat_unmerges_bit_for_bit_where_peft_comes_near() -> None:
    ours, theirs = configs("miss", "llama", target_modules=["q_proj"], r=8, init_weights="bat")
    for model, exact in (
        (trimtab.get_peft_model(base("llama"), ours), True),
        (quiet_peft(base("llama"), theirs), False),
    ):
        move(model)
        before = base("llama").model.layers[0].self_attn.q_proj.weight
        model.merge_adapter()
        model.unmerge_adapter()
        after = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
        assert torch.equal(before, after) == exact and (before - after).abs().max() < 1e-3


def test_each_adapter_has_its_own_variant_where_peft_s_layers_keep_the_first() -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "r": 8}
    first, second = configs("miss", "llama", **fields), configs("miss", "llama", init_weights="bat", **fields)
    us, them = trimtab.get_peft_model(base("llama"), first[0]), quiet_peft(base("llama"), first[1])
    alone = quiet_peft(base("llama"), configs("miss", "llama", init_weights="bat", **fields)[1])
    move(alone)
    for model, config in ((us, second[0]), (them, second[1])):
        model.add_adapter("second", config)
        model.set_adapter("second")
    tensors = peft.get_peft_model_state_dict(alone)
    trimtab.set_peft_model_state_dict(us, tensors, "second")
    peft.set_peft_model_state_dict(them, tensors, "second")
    close(logits(us, "llama"), logits(alone, "llama"))
    with pytest.raises(RuntimeError):
        logits(them, "llama")


def test_merging_leaves_a_bfloat16_adapter_as_it_was_where_peft_changes_its_shape() -> None:
    ours, theirs = configs("miss", "llama", target_modules=["q_proj"], r=8, init_weights="mini", mini_r=2)
    low = torch.bfloat16
    us = trimtab.get_peft_model(base("llama").to(low), ours, autocast_adapter_dtype=False)
    them = peft.get_peft_model(base("llama").to(low), theirs, autocast_adapter_dtype=False)
    shapes = []
    for model in (us, them):
        model.merge_adapter()
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        shapes.append(tuple(layer.miss_block["default"].shape))
    assert shapes == [(8, 2), (8, 32)]


@pytest.mark.parametrize("init", [True, "bat"])
def test_folders_of_bone_s_time_are_read_where_peft_knows_the_name_no_more(init: bool | str, tmp_path: Path) -> None:
    _, theirs = configs("miss", "llama", target_modules=["q_proj", "down_proj"], r=8, init_weights=init)
    them = quiet_peft(base("llama"), theirs)
    move(them)
    them.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {k.replace("miss_block", "bone_block"): v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    values = json.loads((tmp_path / "adapter_config.json").read_text()) | {"peft_type": "BONE"}
    del values["miss_dropout"], values["mini_r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    close(logits(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path), "llama"), logits(them, "llama"))
    with pytest.raises(Exception, match="BONE"):
        peft.PeftModel.from_pretrained(base("llama"), str(tmp_path))


# -- BEFT -------------------------------------------------------------------------------------------------------------
def test_a_bias_is_merged_where_there_was_none_and_peft_gives_up() -> None:
    ours, theirs = configs("beft", "llama")
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    move(them)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    want = logits(them, "llama")
    us.merge_adapter()
    close(logits(us, "llama"), want)
    with pytest.raises(ValueError, match="no bias"):
        them.merge_adapter()


def test_merged_biases_are_what_peft_merges() -> None:
    ours, theirs = configs("beft", "bert")
    us, them = trimtab.get_peft_model(base("bert"), ours), quiet_peft(base("bert"), theirs)
    move(them)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    want = them.merge_and_unload().state_dict()
    for key, value in us.merge_and_unload().state_dict().items():
        close(value, want[key], 0)


# -- SHiRA ------------------------------------------------------------------------------------------------------------
def test_indices_that_windows_writes_as_floats_are_read(tmp_path: Path) -> None:
    _, theirs = configs("shira", "llama", r=4)
    them = quiet_peft(base("llama"), theirs)
    move(them)
    them.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for k, v in tensors.items() if "indices" in k} == {torch.int32}
    save_file({k: v.float() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    close(logits(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path), "llama"), logits(them, "llama"))


def test_a_mask_of_one_s_own_that_is_missing_is_an_error_before_the_first_forward() -> None:
    with pytest.warns(UserWarning, match="not recognized"):
        ours, theirs = configs("shira", "llama", r=4, mask_type="mine")
    with pytest.raises(trimtab.errors.NotSupported, match="mask_fn"):
        trimtab.get_peft_model(base("llama"), ours)
    them = quiet_peft(base("llama"), theirs)
    with pytest.raises(KeyError):
        logits(them, "llama")


# -- OSF --------------------------------------------------------------------------------------------------------------
def test_gradients_keep_out_of_what_stays_on_bfloat16_too_where_peft_s_do_not() -> None:
    ours, theirs = configs("osf", "llama", target_modules=["q_proj"])
    low = torch.bfloat16
    us, them = trimtab.get_peft_model(base("llama").to(low), ours), quiet_peft(base("llama").to(low), theirs)
    shares = []
    for model in (us, them):
        batch = inputs("llama")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        U, _, _ = torch.linalg.svd(layer.base_layer.weight.float())
        grad = layer.osf_svd_params["default"]["U_low"].grad.float()
        shares.append(((U[:, :16].T @ grad).norm() / grad.norm()).item())
    assert shares[0] < 0.02 and shares[1] > 0.2


def test_several_osf_adapters_add_up_and_unmerge_where_peft_applies_one_for_good() -> None:
    (first, theirs), (second, theirs_second) = (configs("osf", "llama", target_modules=["q_proj"]) for _ in range(2))
    us, them = trimtab.get_peft_model(base("llama"), first), quiet_peft(base("llama"), theirs)
    us.add_adapter("second", second)
    them.add_adapter("second", theirs_second)
    for model, name in ((us, "default"), (us, "second"), (them, "default"), (them, "second")):
        model.set_adapter(name)
        move(model)
    one = logits(us, "llama")
    us.set_adapter(["default", "second"])
    them.base_model.set_adapter(["default", "second"])
    ours, theirs_both = logits(us, "llama"), logits(them, "llama")
    close(theirs_both, logits_of(them, "default"))
    assert (ours - one).abs().max() > 1e-3
    us.merge_adapter()
    close(logits(us, "llama"), ours)
    with us.disable_adapter():
        close(logits(us, "llama"), logits(base("llama"), "llama"), 0)
    us.unmerge_adapter()
    close(logits(us, "llama"), ours, 0)
    them.merge_adapter()
    with them.disable_adapter():
        assert (logits(them, "llama") - logits(base("llama"), "llama")).abs().max() > 1e-3
    with pytest.raises(NotImplementedError):
        them.unmerge_adapter()


def logits_of(model: Any, name: str) -> torch.Tensor:
    model.base_model.set_adapter(name)
    found = logits(model, "llama")
    model.base_model.set_adapter(["default", "second"])
    return found


def test_osf_adapts_conv1d_where_peft_leaves_it_out() -> None:
    ours, theirs = configs("osf", "gpt2")
    us, them = trimtab.get_peft_model(base("gpt2"), ours), quiet_peft(base("gpt2"), theirs)
    assert len(us.get_layer_status()) == 6 and not [k for k in them.state_dict() if "osf" in k]

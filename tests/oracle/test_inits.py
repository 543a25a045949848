"""Initialisations against peft: the same start, the same training, and files that travel both ways."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import TASKS, base, close, inputs, logits, move, quiet_peft
from torch import Tensor, nn

import trimtab
from trimtab.core.config import config_for
from trimtab.errors import BadCheckpoint, ConfigError

sys.modules.setdefault("attr", dataclasses)  # peft's CorDA takes `dataclass` from attrs, which it does not ask for
their_preprocess_corda: Any = importlib.import_module("peft.tuners.lora.corda").preprocess_corda

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
OWN = {"corda": "corda_config", "lora_ga": "lora_ga_config", "eva": "eva_config"}
CLASSES = {"corda": "CordaConfig", "lora_ga": "LoraGAConfig", "eva": "EvaConfig"}
SHIFTED = [
    ("pissa", {}, "llama"),
    ("pissa", {"use_rslora": True}, "gpt2"),
    ("pissa", {"use_dora": True}, "llama"),
    ("pissa_niter_16", {}, "llama"),
    ("olora", {}, "llama"),
    ("olora", {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"v_proj": 3}}, "llama"),
    ("corda", {"own": {"corda_method": "ipm"}}, "llama"),
    ("corda", {"own": {"corda_method": "kpm"}}, "gpt2"),
    ("lora_ga", {"own": {}}, "llama"),
    ("lora_ga", {"own": {"direction": "ArBr", "scale": "unit"}}, "gpt2"),
    ("lora_ga", {"own": {"direction": "A2rBr", "scale": "gd_scale"}}, "llama"),
    ("lora_ga", {"own": {"scale": "weight_svd"}}, "llama"),
]
each = pytest.mark.parametrize(
    ("name", "options", "model"), SHIFTED, ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else v
)


def option_class(library: Any, name: str) -> Any:
    return getattr(library, name, None) or getattr(importlib.import_module("peft.tuners.lora.config"), name)


def both(name: str, options: dict[str, Any], model: str) -> tuple[Any, Any]:
    fields = dict(r=4, lora_alpha=6, target_modules=TARGETS[model], task_type=TASKS[model], init_lora_weights=name)
    fields |= {k: v for k, v in options.items() if k != "own"}
    made = []
    for library in (trimtab, peft):
        own = {OWN[name]: option_class(library, CLASSES[name])(**options["own"])} if "own" in options else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.append(library.LoraConfig(**copy.deepcopy(fields), **own))
    return made[0], made[1]


def loss(model: Any, row: int | None = None) -> Tensor:
    batch = inputs("llama")
    batch = {k: v if row is None else v[row : row + 1] for k, v in batch.items()}
    return model(**batch, labels=torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)).loss


def start(name: str, options: dict[str, Any], model: str) -> tuple[Any, Any]:
    """Ours and peft's, each as it begins."""
    ours, theirs = both(name, options, model)
    mine, yours = base(model), base(model)
    torch.manual_seed(3)
    for library, net, cfg in ((trimtab, mine, ours), (peft, yours, theirs)):
        if name == "corda":
            preprocess = trimtab.preprocess_corda if library is trimtab else their_preprocess_corda
            preprocess(net, cfg, lambda net=net: [net(inputs("llama")["input_ids"][i : i + 1]) for i in range(2)])
        if name == "lora_ga":
            for module in net.modules():
                module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)  # type: ignore[assignment]
            library.preprocess_loraga(net, cfg, lambda net=net: [net(**b).loss.backward() for b in batches()] and None)
    return trimtab.get_peft_model(mine, ours), quiet_peft(yours, theirs)


def factors(model: nn.Module) -> dict[str, tuple[float, Tensor, Tensor]]:
    """s, A and B of each layer, with the signs that singular vectors may have either way taken off."""
    found = {}
    for path, module in model.named_modules():
        if not path.endswith(".base_layer") and hasattr(module, "base_layer"):
            layer: Any = module
            A, B = (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
            s = layer.scaling["default"] if isinstance(layer, peft.tuners.lora.LoraLayer) else scale(layer)
            signs = A.gather(1, A.abs().argmax(1, keepdim=True)).sign(), B.gather(0, B.abs().argmax(0, keepdim=True)).sign()
            found[path] = (s, A * signs[0], B * signs[1])
    return found


def scale(layer: Any) -> float:
    adapter = layer.adapters["default"]
    return getattr(adapter, "lora", adapter).s


def descend(model: Any, steps: int = 3, rate: float = 0.05) -> list[float]:
    seen = []
    for _ in range(steps):
        found = loss(model.eval())
        found.backward()
        seen.append(found.item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None and p.requires_grad:
                    p -= rate * p.grad
                p.grad = None
    return seen


@each
def test_it_starts_and_trains_as_theirs(name: str, options: dict[str, Any], model: str) -> None:
    ours, theirs = start(name, options, model)
    want = logits(base(model), model)
    assert torch.equal(logits(ours, model), want) or options.get("use_dora")
    close(logits(ours, model), want, 1e-5)
    close(logits(theirs, model), want, 1e-4)
    mine, yours = factors(ours), factors(theirs)
    assert mine.keys() == yours.keys() and len(mine) == 2 * len(TARGETS[model])
    for path, (s, A, B) in mine.items():
        assert s == yours[path][0] and B.norm() * A.norm() > 1e-4
        if name != "pissa_niter_16":  # theirs starts from other random numbers
            close(A, yours[path][1], 1e-3)
            close(B, yours[path][2], 1e-2 if options.get("own", {}).get("scale") == "weight_svd" else 1e-3)
        assert abs(A.norm() / yours[path][1].norm() - 1) < 1e-2 > abs(B.norm() / yours[path][2].norm() - 1)
    a, b = descend(ours), descend(theirs)
    assert a[-1] < a[0] and max(abs(x - y) for x, y in zip(a, b, strict=True)) < 5e-3


@each
def test_what_is_saved_fits_the_model_as_published_here_and_there(
    name: str, options: dict[str, Any], model: str, tmp_path: Path
) -> None:
    ours, _ = start(name, options, model)
    move(ours)
    ours.save_pretrained(tmp_path)
    want = logits(ours, model)
    assert (want - logits(base(model), model)).abs().max() > 1e-3
    cfg = trimtab.PeftConfig.from_pretrained(tmp_path)
    assert (cfg.r, cfg.init_lora_weights) == (8, True)  # type: ignore[attr-defined]
    assert torch.equal(logits(trimtab.PeftModel.from_pretrained(base(model), tmp_path), model), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(logits(peft.PeftModel.from_pretrained(base(model), str(tmp_path)), model), want, 1e-5 * float(want.abs().max()))
    close(logits(ours.merge_and_unload(), model), want, 1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_their_folder_is_read_as_it_is_where_the_start_can_be_made_again(name: str, tmp_path: Path) -> None:
    _, theirs = start(name, {}, "llama")
    descend(theirs)
    theirs.save_pretrained(tmp_path)
    close(logits(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path), "llama"), logits(theirs, "llama"), 1e-4)


@pytest.mark.parametrize("name", ["pissa_niter_16", "corda", "lora_ga"])
def test_and_refused_where_it_cannot_which_they_read_as_another_adapter(name: str, tmp_path: Path) -> None:
    _, theirs = start(name, {"own": {}} if name in OWN else {}, "llama")
    theirs.save_pretrained(tmp_path / "start")
    descend(theirs, 6)
    theirs.save_pretrained(tmp_path / "plain")
    want = logits(theirs, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "corda":
            with pytest.raises(ValueError, match="eigens"):
                peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "plain"))
        else:
            again = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "plain"))
            assert (logits(again, "llama") - want).abs().max() > 1e-3
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises((BadCheckpoint, ConfigError), match="path_initial_model_for_weight_conversion"):
        trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "plain")
    close(logits(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "converted"), "llama"), want, 1e-4)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(8)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 37, (4, 12), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return made


@pytest.mark.parametrize("own", [{}, {"rho": 1.0}, {"whiten": True, "adjust_scaling_factors": False}], ids=str)
def test_eva_finds_what_theirs_finds(own: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both("eva", {"own": {"tau": 0.5} | own}, "llama")
    mine, yours = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    data = batches(1)  # of several batches theirs reads as many as it takes, again and again
    a = trimtab.get_eva_state_dict(mine, data)
    b = peft.get_eva_state_dict(yours, data, show_progress_bar=False)
    assert a.keys() == b.keys() and {k: len(v) for k, v in a.items()} == {k: len(v) for k, v in b.items()}
    for key, rows in a.items():  # theirs are found by a random projection
        assert torch.cosine_similarity(rows, b[key]).abs().min() > 0.85
    trimtab.initialize_lora_eva_weights(mine, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(yours, data, show_progress_bar=False)
    assert torch.equal(logits(mine, "llama"), logits(base("llama"), "llama"))
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(mine.peft_config["default"], field) == getattr(yours.peft_config["default"], field)
    x, y = descend(mine), descend(yours)
    assert x[-1] < x[0] and (own.get("whiten") or max(abs(i - j) for i, j in zip(x, y, strict=True)) < 5e-3)
    mine.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path))
    close(logits(again, "llama"), logits(mine, "llama"))


def test_configs_are_spelled_as_theirs() -> None:
    for name in ("EvaConfig", "CordaConfig", "LoraGAConfig", "LoftQConfig"):
        mine, yours = vars(getattr(trimtab, name)()), vars(option_class(peft, name)())
        assert mine == yours
    written = config_for("lora", eva_config={"rho": 3.0}, init_lora_weights="eva").to_dict()
    assert written["eva_config"] == vars(peft.EvaConfig(rho=3.0))

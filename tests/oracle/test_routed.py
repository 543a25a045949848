"""Methods that depend on the call, against peft: aLoRA, Arrow, X-LoRA, Poly, and mixed batches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import base, close, configs, exchange, inputs, keys, move, quiet_peft, same_settings
from torch import Tensor

import trimtab

IDS = inputs("llama")["input_ids"]
INVOCATION = IDS[0, 3:5].tolist()


def whole(model: Any, name: str) -> Tensor:
    """Logits of rows without padding, of which the first alone holds the invocation."""
    assert not (IDS[1].unfold(0, 2, 1) == torch.tensor(INVOCATION)).all(-1).any()
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("options", [{}, {"r": 4, "lora_alpha": 32, "use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_exchange_alora(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    exchange(model, *configs("alora", model, alora_invocation_tokens=INVOCATION, **options), tmp_path, answer=whole)


def test_generate_with_alora_is_peft_s_with_a_cache_and_without() -> None:
    ours, theirs = configs("alora", "llama", alora_invocation_tokens=INVOCATION, init_lora_weights=False, lora_alpha=64)
    us, them = trimtab.get_peft_model(base("llama"), ours).eval(), quiet_peft(base("llama"), theirs)
    move(them)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    options: dict[str, Any] = {"input_ids": IDS[:1], "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, drifts = them.generate(**options), them.generate(**options, use_cache=False)
    for found in (us.generate(**options), us.generate(**options, use_cache=False)):
        assert torch.equal(found.sequences, want.sequences)
        close(torch.stack(found.logits), torch.stack(want.logits), 2e-4)
    # peft counts from the end of a row, so without a cache each new token moves where the adapter begins
    assert (torch.stack(drifts.logits) - torch.stack(want.logits)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="Beam search"):
        them.generate(**options, num_beams=2)
    assert us.generate(**options, num_beams=2).sequences.shape == want.sequences.shape


TASKS = torch.tensor([2, 0])


def of_tasks(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        call = inputs(name) | ({"task_ids": TASKS} if hasattr(model, "peft_config") else {})
        found = model.eval()(**call).logits
    return found * inputs(name)["attention_mask"][..., None] if name == "llama" else found


@pytest.mark.parametrize("options", [{}, {"n_splits": 2, "n_skills": 3, "r": 4}, {"init_weights": False}], ids=str)
@pytest.mark.parametrize("model", ["llama", "t5", "bert"])
def test_exchange_poly(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    exchange(model, *configs("poly", model, n_tasks=3, **options), tmp_path, answer=of_tasks)


def test_poly_draws_what_peft_draws_in_training() -> None:
    ours, theirs = configs("poly", "llama", n_tasks=3, n_splits=2, target_modules=["layers.1.self_attn.q_proj"])
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    move(them)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    found = []
    for model in (us, them):
        torch.manual_seed(3)
        found.append(model.train()(input_ids=IDS, task_ids=TASKS).logits)
    close(found[0], found[1])
    assert (found[0] - us.eval()(input_ids=IDS, task_ids=TASKS).logits).abs().max() > 1e-4


def test_poly_under_gradient_checkpointing_where_peft_s_tasks_are_gone_in_the_backward() -> None:
    ours, theirs = configs("poly", "llama", n_tasks=3)
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    for model in (us, them):
        model.train().get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    us(input_ids=IDS, task_ids=TASKS, labels=IDS).loss.backward()
    loss = them(input_ids=IDS, task_ids=TASKS, labels=IDS).loss
    with pytest.raises(ValueError, match="task_ids should not be None"):
        loss.backward()


def experts(folder: Path, count: int, model: str = "llama", **more: Any) -> list[str]:
    """Folders of LoRAs that peft wrote."""
    for i in range(count):
        them = quiet_peft(base(model), configs("lora", model, r=4, **more)[1])
        torch.manual_seed(i)
        move(them, 0.1 * (i + 1))
        for n, p in them.named_parameters():
            if "lora_" in n:
                torch.nn.init.normal_(p, std=0.2)
        them.save_pretrained(str(folder / f"expert{i}"))
    return [str(folder / f"expert{i}") for i in range(count)]


ARROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"top_k": 2}, {}),
    ({"top_k": 3, "router_temperature": 0.2}, {"lora_alpha": 16, "use_rslora": True}),
    ({"top_k": 1, "use_gks": True}, {}),
]


@pytest.mark.parametrize(("settings", "lora"), ARROWS, ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_arrow(settings: dict[str, Any], lora: dict[str, Any], model: str, tmp_path: Path) -> None:
    paths = experts(tmp_path, 5, model, **lora)
    general = paths[3:] if settings.get("use_gks") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        them = peft.create_arrow_model(base(model), paths[:3], peft.ArrowConfig(**settings, rng_seed=1), general).eval()
    us = trimtab.create_arrow_model(base(model), paths[:3], trimtab.ArrowConfig(**settings, rng_seed=1), general).eval()
    before = {n: p.clone() for n, p in us.named_parameters()}
    close(whole(us, model), whole(them, model), 2e-5)
    assert (whole(us, model) - whole(base(model), model)).abs().max() > 1e-2
    assert all(torch.equal(p, before[n]) for n, p in us.named_parameters())
    us.save_pretrained(tmp_path / "ours")
    them.save_pretrained(str(tmp_path / "theirs"))
    for name in us.peft_config:
        assert keys(tmp_path / "ours" / name) == keys(tmp_path / "theirs" / name)
    if model == "llama":  # peft leaves fan_in_fan_out of a second adapter as it was given
        same_settings(tmp_path / "ours" / "arrow_router", tmp_path / "theirs" / "arrow_router")
    if not general:  # peft has changed the experts' weights, and would change them again
        loaded = trimtab.PeftModel.from_pretrained(base(model), tmp_path / "theirs" / "task_0", "task_0")
        for name in ("task_1", "task_2", "arrow_router"):
            loaded.load_adapter(tmp_path / "theirs" / name, name)
        loaded.set_adapter("arrow_router")
        close(whole(loaded, model), whole(us, model), 0)


def mixed_by_peft(model: str, adapters: dict[str, str], **options: Any) -> Any:
    made: Any = base(model)
    made.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        them = peft.get_peft_model(made, peft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **options)).eval()
    for n, p in sorted(them.named_parameters()):
        if "classifier" in n:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(n)))
    return them


XLORAS: list[dict[str, Any]] = [
    {"xlora_depth": 2, "xlora_size": 8},
    {"xlora_depth": 3, "xlora_size": 8, "layerwise_scalings": True, "softmax_temperature": 0.3, "global_scaling_weight": 2.0},
    {"xlora_depth": 2, "xlora_size": 8, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    {"xlora_depth": 2, "xlora_size": 8, "scaling_pass_value": 0.5, "top_k_lora": 1, "xlora_dropout_p": 0.0},
]


@pytest.mark.parametrize("options", XLORAS, ids=str)
def test_xlora(options: dict[str, Any], tmp_path: Path) -> None:
    adapters = {str(i): path for i, path in enumerate(experts(tmp_path, 3, lora_alpha=16))}
    them = mixed_by_peft("llama", adapters, hidden_size=32, **options)
    them.save_pretrained(str(tmp_path / "theirs"))
    us = trimtab.get_peft_model(base("llama"), trimtab.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **options)).eval()
    given = {n.rpartition("classifier.")[2]: p for n, p in them.named_parameters() if "classifier" in n}
    with torch.no_grad():
        for n, p in us.named_parameters():
            if "classifier" in n:
                p.copy_(given[n.rpartition("classifier.")[2]])
    want = whole(them, "llama")
    close(whole(us, "llama"), want, 2e-5)
    close(us.get_latest_scalings(), them.get_latest_scalings())
    assert (want - whole(base("llama"), "llama")).abs().max() > 1e-2
    us.save_pretrained(tmp_path / "ours")
    same_settings(tmp_path / "ours", tmp_path / "theirs")
    for name in adapters:
        assert keys(tmp_path / "ours" / name) == keys(Path(adapters[name]))
        assert any("lm_head.weight" in k for k in keys(tmp_path / "theirs" / name))  # an expert's file holds the base
    close(whole(trimtab.PeftModel.from_pretrained(base("llama"), tmp_path / "ours"), "llama"), want, 2e-5)
    lost = keys(tmp_path / "ours").keys() - keys(tmp_path / "theirs").keys()
    assert lost and all(k.split(".")[-2] in adapters for k in lost)  # names of experts cut keys out of peft's file


def test_a_classifier_file_whose_keys_are_whole_is_read_by_peft_as_by_us(tmp_path: Path) -> None:
    adapters = {str(i): path for i, path in enumerate(experts(tmp_path, 2))}
    options: dict[str, Any] = {"adapters": adapters, "hidden_size": 32, "xlora_depth": 2, "xlora_size": 8}
    us = trimtab.get_peft_model(base("llama"), trimtab.XLoraConfig(task_type="CAUSAL_LM", **options)).eval()
    move(us, 0.5)
    us.save_pretrained(tmp_path / "ours")
    them = mixed_by_peft("llama", **options)
    peft.set_peft_model_state_dict(them, peft.load_peft_weights(str(tmp_path / "ours"), device="cpu"))
    close(whole(us, "llama"), whole(them, "llama"), 2e-5)


def test_xlora_takes_experts_of_any_name_where_peft_takes_numbers(tmp_path: Path) -> None:
    adapters = dict(zip(("law", "french"), experts(tmp_path, 2), strict=True))
    with pytest.raises(KeyError, match="law"):
        whole(mixed_by_peft("llama", adapters, hidden_size=32), "llama")
    us = trimtab.get_peft_model(base("llama"), trimtab.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters))
    assert whole(us, "llama").shape == (2, 7, 37)


def test_names_of_rows_go_to_every_method_where_peft_s_vera_leaves_them_unread() -> None:
    ours, theirs = configs("vera", "llama", r=8, d_initial=0.5)
    us, them = trimtab.get_peft_model(base("llama"), ours).eval(), quiet_peft(base("llama"), theirs)
    move(them)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    plain = whole(base("llama"), "llama")
    with torch.no_grad():
        mine, theirs_ = (m(input_ids=IDS, adapter_names=["default", "__base__"]).logits for m in (us, them))
    close(mine[0], whole(us, "llama")[0])
    close(mine[1], plain[1])
    assert (theirs_[1] - plain[1]).abs().max() > 1e-3  # the adapter, though the row asks for the base


def test_names_of_rows_of_lora_are_as_peft_s() -> None:
    ours, theirs = configs("lora", "llama", r=4)
    us, them = trimtab.get_peft_model(base("llama"), ours), quiet_peft(base("llama"), theirs)
    us.add_adapter("two", configs("lora", "llama", r=4)[0])
    them.add_adapter("two", configs("lora", "llama", r=4)[1])
    for i, name in enumerate(("default", "two")):
        them.set_adapter(name)
        move(them, 0.1 * (i + 1))
        trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them, adapter_name=name), name)
    for names in (["default", "two"], ["two", "__base__"]):
        options: dict[str, Any] = {"input_ids": IDS, "adapter_names": names}
        with torch.no_grad():
            close(us.eval()(**options).logits, them.eval()(**options).logits)
        options |= {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
        assert torch.equal(us.generate(**options), them.generate(**options))

"""No. 53: PiSSA and OLoRA subtract their start; the base keeps its bytes, and files are plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from little import far
from small_llama import llama, logits, move

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.errors import ConfigError

STARTS = ["pissa", "olora", "pissa_niter_4"]


def tuned(start: str, seed: int) -> PeftModel:
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj", "down_proj"]))
    move(model, seed)
    return model.eval()


@pytest.mark.parametrize("start", STARTS)
def test_the_base_keeps_its_bytes_and_disabled_is_the_base(start: str) -> None:
    plain = llama()
    model = tuned(start, 1)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    assert far(logits(model), logits(plain)) > 1e-2
    bare = model.unload().state_dict()
    assert all(torch.equal(bare[k], v) for k, v in plain.state_dict().items())


def test_two_such_adapters_on_one_base_are_each_what_they_were(tmp_path: Path) -> None:
    want = {}
    for seed, start in enumerate(("pissa", "olora")):
        model = tuned(start, seed)
        want[start] = logits(model)
        model.save_pretrained(tmp_path / start, path_initial_model_for_weight_conversion="x")
    both = PeftModel.from_pretrained(llama(), tmp_path / "pissa", adapter_name="pissa")
    both.load_adapter(tmp_path / "olora", "olora")
    for name in ("olora", "pissa"):
        both.set_adapter(name)
        assert far(logits(both), want[name]) < 1e-5


def test_what_does_not_go_together_is_said_by_the_config() -> None:
    with pytest.raises(ConfigError, match="init_lora_weights"):
        get_peft_model(llama(), LoraConfig(init_lora_weights="pisa", target_modules=["q_proj"]))

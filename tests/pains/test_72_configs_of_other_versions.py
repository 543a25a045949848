"""No. 72: configs that older and newer versions wrote are read; what would make another adapter is named, not dropped."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from little import far
from small_llama import llama, logits, move

from trimtab import LoraConfig, PeftModel, get_peft_model
from trimtab.errors import ConfigError, TrimtabWarning

OLD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
       "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
       "lora_dropout": 0.0, "modules_to_save": None}  # fmt: skip
VERSIONS: dict[str, dict[str, Any]] = {
    "0.2": {"merge_weights": False, "enable_lora": None},
    "0.5": {"init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.7": {"rank_pattern": {}, "alpha_pattern": {}, "auto_mapping": None, "loftq_config": {}, "megatron_config": None},
    "0.11": {"use_dora": False, "use_rslora": False, "layer_replication": None, "megatron_core": "megatron.core"},
    "0.14": {"eva_config": None, "lora_bias": False, "exclude_modules": None},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"target_parameters": None, "qalora_group_size": 16, "use_qalora": False},
    "a later one": {"comet_config": None, "use_comet": False, "comet_layers": [], "peft_version": "0.40.0"},
}


def folder(path: Path, more: dict[str, Any]) -> tuple[Path, Any]:
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    move(model)
    model.save_pretrained(path)
    (path / "adapter_config.json").write_text(json.dumps(OLD | more))
    return path, logits(model.eval())


@pytest.mark.parametrize("version", VERSIONS)
def test_each_loads_as_it_was(version: str, tmp_path: Path) -> None:
    path, want = folder(tmp_path, VERSIONS[version])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        assert far(logits(PeftModel.from_pretrained(llama(), path)), want) == 0


def test_an_unknown_option_that_was_used_is_named(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, {"use_comet": True})
    with pytest.raises(ConfigError, match=r"LoraConfig has no use_comet=True.* would load a different adapter"):
        PeftModel.from_pretrained(llama(), path)

"""Configs and the registry: checked values, round trips, methods found by their names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import trimtab
from trimtab.core.config import PeftConfig, config_for, get_peft_config, load, method_of, methods
from trimtab.errors import ConfigError, NotSupported


def test_every_method_is_found_by_its_name_and_its_file() -> None:
    root = Path(trimtab.__file__).parent / "methods"
    files = {p.stem for p in [*root.glob("*.py"), *root.glob("prompt/*.py")] if not p.stem.startswith("_")}
    assert set(methods()) == files and methods() == sorted(methods())
    for name in methods():
        found = load(name)
        assert found.name == name and found.adapter.__module__.rpartition(".")[2] == name
        source = r"arXiv:|doi |doi\.org|OpenReview|openreview\.net|NeurIPS|ICLR|no paper"
        assert found.adapter.__doc__ and re.search(source, found.adapter.__doc__)
        assert method_of(config_for(name, **found.small)).adapter is found.adapter
        assert importlib.import_module(found.adapter.__module__).__doc__


@pytest.mark.parametrize("name", methods())
def test_a_config_is_read_as_it_is_written(name: str, tmp_path: Path) -> None:
    config = config_for(name, **load(name).small, task_type="CAUSAL_LM", base_model_name_or_path="x")
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config) and again.to_dict() == config.to_dict() | {"inference_mode": True}
    assert get_peft_config(config.to_dict()).to_dict() == config.to_dict()
    assert PeftConfig.from_pretrained(tmp_path, revision="main").revision == "main"  # fills what the file leaves null
    assert PeftConfig.from_pretrained(tmp_path, base_model_name_or_path="y").base_model_name_or_path == "x"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"r": 0}, "r=0: it must be at least 1"),
    ("lora", {"r": True}, "r=True"),
    ("lora", {"lora_dropout": 1.5}, "lora_dropout=1.5: it lies between 0 and 1"),
    ("lora", {"bias": "some"}, "bias='some'"),
    ("lora", {"task_type": "CAUSAL"}, "Did you mean 'CAUSAL_LM'"),
    ("lora", {"lora_alpah": 3}, "Did you mean 'lora_alpha'"),
    ("lora", {"lora_bias": True, "use_dora": True}, "do not go together"),
    ("lora", {"layers_pattern": "h"}, "layers_pattern='h' says where layers_to_transform counts"),
    ("oft", {"r": 2}, "give one of the two"),
    ("ia3", {"target_modules": ["a"], "feedforward_modules": ["b"]}, "'b' is not among"),
    ("vera", {"r": -1}, "r=-1"),
    ("prompt_tuning", {"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
    ("prompt_tuning", {"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_text"),
    ("prefix_tuning", {"init_weights": "ones"}, "init_weights='ones'"),
]


@pytest.mark.parametrize(("name", "fields", "message"), BAD, ids=lambda v: str(v)[:40])
def test_a_wrong_value_names_its_field(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for(name, **fields)


def test_variants_exclude_each_other_and_unknown_methods_name_the_nearest() -> None:
    with pytest.raises(NotSupported, match="cannot be combined"):
        method_of(trimtab.LoraConfig(use_dora=True, use_qalora=True))
    with pytest.raises(ConfigError, match="Did you mean 'prefix_tuning'"):
        load("prefix_tunning")

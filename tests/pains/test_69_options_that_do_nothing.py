"""No. 69: a mistyped option is an error with the nearest name, on the command line, in YAML and in Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from little import finished

from trimtab import LoraConfig
from trimtab.cli.settings import resolve
from trimtab.errors import ConfigError


def test_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        resolve(["--lerning_rate", "1e-4"])
    with pytest.raises(ConfigError, match="random_state"):
        resolve(["--random_stat", "3"])
    (tmp_path / "run.yaml").write_text("seed: 1\nlora_aplha: 4\n")
    with pytest.raises(ConfigError, match=r"run.yaml:2.*Did you mean 'lora_alpha'"):
        resolve(["--config", str(tmp_path / "run.yaml")])


def test_in_python() -> None:
    with pytest.raises(TypeError, match="lora_aplha"):
        LoraConfig(lora_aplha=4)
    with pytest.raises(ConfigError, match="'all_of_them'"):
        LoraConfig(bias="all_of_them")


def test_the_run_says_what_it_was_given(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = finished(tmp_path_factory)
    record, config = (json.loads((out / name).read_text()) for name in ("run.json", "adapter_config.json"))
    assert record["options"]["seed"] == 5 and record["options"]["learning_rate"] == 1e-2
    assert record["options"]["max_length"] == 2048  # resolved: also what was left at its default
    assert (config["r"], config["lora_alpha"]) == (2, 6)

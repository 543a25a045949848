"""No. 41: a model folder that brings code runs none of it unless that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from little import options, said
from model_folder import write_model, write_rows

from trimtab.errors import ConfigError
from trimtab.train.load import load_model


def trapped(folder: Path) -> tuple[Path, Path]:
    """A model whose config sends to a file that writes another file when it is imported."""
    write_model(folder)
    sprung = folder.with_name("sprung")
    (folder / "modeling_trap.py").write_text(f"open({str(sprung)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "trap", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, sprung


def test_nothing_runs_and_the_message_says_how_to_allow_it(tmp_path: Path) -> None:
    from trimtab.train.run import run

    folder, sprung = trapped(tmp_path / "model")
    with pytest.raises(ConfigError, match="--trust_remote_code, if you trust it"):
        load_model(folder, dtype=torch.float32)
    with pytest.raises(ConfigError):
        said(run, options(folder, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"))
    assert not sprung.exists() and not (tmp_path / "out").exists()

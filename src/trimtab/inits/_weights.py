"""Single weights out of a model folder, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.errors import BadCheckpoint


class Weights:
    """The tensors in the safetensors of a model: a file, a folder, a hub id in the local cache, or where `model` came from."""

    def __init__(self, model: nn.Module, path: str | Path | None = None) -> None:
        from safetensors import safe_open

        asked = str(path or getattr(model, "name_or_path", None) or "")
        found = Path(asked).expanduser()
        if asked and not found.exists():
            from huggingface_hub import snapshot_download

            try:
                found = Path(snapshot_download(asked, local_files_only=True))
            except (OSError, ValueError):  # not in the cache, or no name that a hub knows
                raise BadCheckpoint(f"no model folder {asked!r} is here; pass model_path") from None
        files = [found] if found.is_file() else sorted(found.glob("*.safetensors")) if asked else []
        if not files:
            raise BadCheckpoint(f"{asked or 'the model'}: no safetensors are there; pass model_path, the folder that has them")
        self.where, self.prefix = found, str(getattr(model, "base_model_prefix", "") or "")
        self.files: dict[str, Any] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            self.files |= dict.fromkeys(opened.keys(), opened)

    def of(self, key: str) -> Tensor:
        """The tensor of this name in the model; files of a body alone have it without the body's name."""
        for name in (key, key.removeprefix(f"{self.prefix}."), f"{self.prefix}.{key}"):
            if name in self.files:
                return self.files[name].get_tensor(name)
        raise BadCheckpoint(f"{self.where} has no tensor {key!r}: it is another model's")

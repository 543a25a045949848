"""Which base an adapter was made for: recorded beside it, in a file of our own that other readers pass by, and checked
when the adapter meets a model.

What is recorded is cheap to read: the fields of `config.json` that decide a model's architecture, a hash over the names,
shapes and dtypes in the headers of its weights, and a hash over a few values of each tensor, by which two models of
one architecture (a base and what was tuned from it) are told apart. The weights are not read.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import BadCheckpoint, TrimtabWarning
from trimtab.files import read_json, write_text
from trimtab.headers import Claim, tensors

FILE = "trimtab.json"
# by any of the names that model families have for them
ESSENTIAL = (
    "model_type", "vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "d_ff",
    "num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "n_head", "num_heads", "num_key_value_heads",
    "head_dim", "num_local_experts", "num_experts", "moe_intermediate_size", "num_experts_per_tok",
)  # fmt: skip
ROWS = "embedding_rows"
SAMPLE = 64  # bytes from the middle of each tensor


def describe(model: Any) -> dict[str, Any] | None:
    """The record of a model's base; None for a model that was not loaded from a folder."""
    folder = folder_of(model)
    if folder is None:
        return None
    four_bit = {"load_in_4bit": True} if getattr(model, "is_loaded_in_4bit", False) else {}
    return {"name": str(getattr(model, "name_or_path", "")), **fingerprint(folder), **four_bit}


def folder_of(model: Any) -> Path | None:
    """Where the weights of a loaded model lie on this machine. Nothing is downloaded."""
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    path = Path(name)
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        path = Path(found).parent if isinstance(found, str) else path
    whole = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return path if whole else None


def fingerprint(folder: Path) -> dict[str, Any]:
    """{config, tensors, dtypes, weights, values} of a model folder."""
    claims = sorted(((name, claim, file) for file, name, claim in tensors(folder)), key=lambda row: row[0])
    shapes, dtypes, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    opened: dict[Path, Any] = {}
    try:
        for name, claim, file in claims:
            shapes.update(f"{name} {list(claim.shape)}\n".encode())
            dtypes.update(f"{claim.dtype}\n".encode())
            if file not in opened:
                opened[file] = file.open("rb")
            values.update(_sample(opened[file], claim))
    finally:
        for file in opened.values():
            file.close()
    kinds = sorted({claim.dtype for _, claim, _ in claims})
    return {
        "config": essential(read_json(folder / "config.json")),
        "tensors": len(claims),
        "dtypes": kinds,
        "weights": shapes.hexdigest()[:32],
        "values": f"{dtypes.hexdigest()[:8]}-{values.hexdigest()[:32]}",
    }


def _sample(file: Any, claim: Claim) -> bytes:
    file.seek(claim.begin + max(0, (claim.end - claim.begin - SAMPLE) // 2))
    return file.read(min(SAMPLE, claim.end - claim.begin))


def essential(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that decide the architecture; those of the language model where there are several."""
    inner: Any = config.get("text_config")
    values = (inner if isinstance(inner, dict) else {}) | {k: v for k, v in config.items() if not isinstance(v, dict)}
    return {k: values[k] for k in ESSENTIAL if isinstance(values.get(k), (str, int))}


def write(path: Path, model: Any, rows: int | None = None) -> None:
    """Put the record of a model's base into an adapter folder, where the model knows its folder, and how many rows its
    input embedding has now: tokens may have been added to the base."""
    base = describe(model)
    found = ({} if base is None else {"base": base}) | ({} if rows is None else {ROWS: rows})
    if found:
        write_text(path / FILE, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        (path / FILE).unlink(missing_ok=True)  # of another base, which stood here before


def read(path: Path) -> dict[str, Any] | None:
    """The record of a base in an adapter folder, if it has one."""
    said = read_json(path / FILE) if (path / FILE).is_file() else {ROWS: 0}
    base: Any = said.get("base")
    if "base" not in said and ROWS in said:
        return None
    text = (base.get(k, "") for k in ("name", "weights", "values")) if isinstance(base, dict) else [None]
    if not all(isinstance(t, str) for t in text) or not isinstance(base.get("config"), dict):
        raise BadCheckpoint(f"{path / FILE} holds no record of a base. Fix: remove it, and nothing is compared")
    return base


def rows(path: Path) -> int | None:
    """How many rows of embeddings the model had that an adapter folder was made on, where that is recorded."""
    found: Any = read_json(path / FILE).get(ROWS) if (path / FILE).is_file() else None
    if found is not None and (type(found) is not int or found < 1):
        raise BadCheckpoint(f"{path / FILE}: {ROWS} is {str(found)[:40]!r}, and no number of rows. Fix: remove the entry")
    return found


def difference(path: Path, model: Any) -> str:
    """How the base that an adapter folder records differs from `model`; empty where it does not, or nothing is known."""
    there = read(path)
    if there is None:
        return ""
    folder = folder_of(model)
    here: dict[str, Any] = fingerprint(folder) if folder else {"config": _live(model)}
    name = str(folder or getattr(model, "name_or_path", "") or type(model).__name__)
    if folder is None and here["config"].get("vocab_size") == rows(path):
        del here["config"]["vocab_size"]  # made longer already, as the base was when the adapter was made
    if why := _apart(there, here):
        return f"made for {there.get('name') or 'a base without a name'}, and this is {name}: {why}"
    if "values" in here and there.get("values", "").partition("-")[0] != here["values"].partition("-")[0]:
        warnings.warn(
            f"{name} is stored in {', '.join(here['dtypes'])}, and the base that {path.name!r} was made for in "
            f"{there.get('dtypes')}: compared by names and shapes alone",
            TrimtabWarning,
        )
    return ""


def _apart(there: dict[str, Any], here: dict[str, Any]) -> str:
    a, b = there["config"], here["config"]
    if changed := [f"{k} {a[k]!r} there, {b[k]!r} here" for k in a if k in b and a[k] != b[k]]:
        return "; ".join(changed[:4])
    if "weights" not in here or "weights" not in there:
        return ""
    if there["weights"] != here["weights"]:
        return f"its {here['tensors']} tensors have other names or shapes than the {there.get('tensors')} there"
    (kind, _, values), (own, _, mine) = (x.get("values", "").partition("-") for x in (there, here))
    same = kind != own or values == mine  # other dtypes have other bytes
    return "" if same else "of one architecture, and with other values in its weights (was one of them tuned further?)"


def _live(model: Any) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return essential(config.to_dict()) if hasattr(config, "to_dict") else {}


def check(path: Path, model: nn.Module, *, strict: bool = True) -> None:
    """Raise `BadCheckpoint` where an adapter folder meets another base than its own; a warning where not `strict`."""
    if not (why := difference(path, model)):
        return
    said = f"the adapter in {path} meets another base: {why}"
    if not strict:
        warnings.warn(said, TrimtabWarning)
        return
    raise BadCheckpoint(
        f"{said}. Nothing was loaded.\n  Fix: load it on the base that it was made for; if you know that the two are the same "
        f"model, remove {path / FILE} (in Python: strict=False)"
    )

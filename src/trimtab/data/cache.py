"""Tokenised data on disk, found again by the hash of everything that decided it. A damaged file is as good as none."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trimtab.data.encode import Example

Parts = dict[str, list[Example]]


def folder() -> Path:
    """`$TRIMTAB_CACHE/data`, or `~/.cache/trimtab/data`."""
    given = os.environ.get("TRIMTAB_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "trimtab") / "data"


def key(**decided_by: Any) -> str:
    """The name of a result: a hash of its inputs and of the code and libraries that make it."""
    content = json.dumps([decided_by, _code(), version("transformers"), version("tokenizers")], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


@cache
def _code() -> str:
    """The version, and the text of this folder: a change of a line here must not find what the old line made."""
    try:
        release = version("trimtab")
    except PackageNotFoundError:
        release = ""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return release + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def save(name: str, parts: Parts, about: dict[str, Any]) -> None:
    """Write atomically: a reader sees the whole file or none. A folder that cannot be written is no reason to stop."""
    import numpy as np
    from safetensors.numpy import save as to_bytes

    examples = [(p, i, e) for p, part in enumerate(parts) for i, e in enumerate(parts[part])]
    sources = list(dict.fromkeys(e.source for _, _, e in examples))
    number = {source: i for i, source in enumerate(sources)}
    tensors = {
        "input_ids": np.array([t for _, _, e in examples for t in e.input_ids], np.int32),  # (tokens,)
        "supervised": np.array([m for _, _, e in examples for m in e.supervised], np.uint8),  # (tokens,)
        "rows": np.array([(p, number[e.source], e.line, len(e.input_ids), *e.prompt) for p, _, e in examples],
                         np.int64).reshape(-1, 6),  # (examples, part source line length prompt prompt)
    }
    meta = {"parts": json.dumps(list(parts)), "sources": json.dumps(sources), "about": json.dumps(about)}
    data = to_bytes(tensors, metadata=meta)
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder(), suffix=".part", delete=False) as file:
            file.write(hashlib.sha256(data).digest() + data)
        Path(file.name).replace(folder() / f"{name}.safetensors")
    except OSError:
        return


def load(name: str) -> tuple[Parts, dict[str, Any]] | None:
    """The examples by part and what was kept about them; None when there is no whole file of that name."""
    from safetensors.numpy import load as from_bytes

    try:
        raw = (folder() / f"{name}.safetensors").read_bytes()
        digest, data = raw[:32], raw[32:]
        if hashlib.sha256(data).digest() != digest:
            return None
        tensors = from_bytes(data)
        meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    except (OSError, ValueError, KeyError):
        return None
    names, sources = json.loads(meta["parts"]), json.loads(meta["sources"])
    ids, mask = tensors["input_ids"].tolist(), tensors["supervised"].astype(bool).tolist()
    parts: Parts = {part: [] for part in names}
    at = 0
    for part, source, line, length, a, b in tensors["rows"].tolist():
        parts[names[part]].append(
            Example(ids[at : at + length], mask[at : at + length], sources[source], line, (a, b)))
        at += length
    return parts, json.loads(meta["about"])

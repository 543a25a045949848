"""What a safetensors file says it holds, read as data and checked before a byte of it is allocated.

The file: 8 bytes little-endian n, n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, the data. A header
may claim anything; here each claim is held against the others and against the size of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from trimtab.errors import BadCheckpoint

LONGEST = 100_000_000  # bytes of a header: the format's own limit
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Claim:
    """One tensor as a header describes it: `begin` and `end` are places in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header(file: Path) -> dict[str, Claim]:
    """The tensors of a safetensors file by name, in the order of their data. Raises `BadCheckpoint` for a claim that cannot
    be true: a size that is not the shape's, offsets that overlap, leave gaps or end elsewhere than the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= min(LONGEST, size - 8):
                raise damaged(file, f"its header claims {length:,} bytes, the file has {size:,}")
            text = opened.read(length)
        said: Any = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise damaged(file, f"its header is no JSON: {str(error)[:200]}") from None
    except OSError as error:
        raise damaged(file, error.strerror or str(error)) from None
    if not isinstance(said, dict):
        raise damaged(file, "its header is no JSON object")
    about: Any = said.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise damaged(file, "its metadata is not text by name")
    return _consistent(file, {k: _claim(file, k, v, 8 + length) for k, v in said.items()}, 8 + length, size)


def damaged(file: Path, why: str) -> BadCheckpoint:
    return BadCheckpoint(f"{file} is damaged or cut off ({why}): copy it again, or take an earlier checkpoint")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _claim(file: Path, name: str, said: Any, start: int) -> Claim:
    row: dict[str, Any] = said if isinstance(said, dict) else {}
    dtype: Any = row.get("dtype")
    shape: Any = row.get("shape")
    offsets: Any = row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(file, f"{name[:100]!r} has the dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise damaged(file, f"{name[:100]!r} has the shape {str(shape)[:60]} at {str(offsets)[:60]}")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        sizes = f"{bits // 8:,} bytes by its shape {shape} and {end - begin:,} by its offsets"
        raise damaged(file, f"{name[:100]!r} claims {sizes}")
    return Claim(dtype, tuple(shape), start + begin, start + end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _consistent(file: Path, claims: dict[str, Claim], start: int, size: int) -> dict[str, Claim]:
    at = start
    ordered = dict(sorted(claims.items(), key=lambda pair: (pair[1].begin, pair[1].end)))
    for name, claim in ordered.items():
        if claim.begin != at:
            raise damaged(file, f"the data of {name[:100]!r} overlaps its neighbour's, or leaves a gap before it")
        at = claim.end
    if at != size:
        raise damaged(file, f"its tensors need {at:,} bytes, the file has {size:,}")
    return ordered


def shards(folder: Path) -> list[Path]:
    """The safetensors files that a model folder is loaded from. No entry of its index may leave the folder."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        said: Any = json.loads(index.read_text(encoding="utf-8"))
        files = {str(name) for name in cast("dict[str, Any]", said["weight_map"]).values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BadCheckpoint(f"{index} is no index of weights ({type(error).__name__}: {str(error)[:100]})") from None
    return [inside(folder, name, INDEX) for name in sorted(files)]


def inside(folder: Path, name: str, where: str) -> Path:
    """The file that `where` calls `name`. It lies in `folder` by its name; a link there, as caches have them, may lead on."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name or "\0" in name or not name.strip():
        raise BadCheckpoint(f"{folder / where} names {name[:200]!r}, which lies outside of the folder: it was not opened")
    path = folder / parts
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise BadCheckpoint(f"{folder / where} names {name[:200]!r}, which is not there: is the download complete?")
    return path


def tensors(folder: Path) -> Iterator[tuple[Path, str, Claim]]:
    """Every tensor of a model folder: (file, name, claim)."""
    for file in shards(folder):
        for name, claim in header(file).items():
            yield file, name, claim

"""Files that are whole or not there: written beside, flushed, renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from trimtab.errors import BadCheckpoint, ConfigError

LONGEST = 10_000_000  # bytes of a JSON file that somebody else may have written


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary neighbour of `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        fill(temporary)
        temporary.chmod(0o644)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda p: p.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk: a rename lasts only when its folder is there."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # whoever reads it next shall read the disk, not what we remember
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `BadCheckpoint`, whatever the file holds instead."""
    try:
        if path.stat().st_size > LONGEST:
            raise BadCheckpoint(f"{path} has {path.stat().st_size:,} bytes; {LONGEST:,} are allowed")
        read: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise BadCheckpoint(f"{path}: not JSON (nested too deeply)") from None
    except BadCheckpoint:
        raise
    except ValueError as error:  # a number of too many digits among them
        raise BadCheckpoint(f"{path}: not JSON ({str(error)[:200]})") from None
    if not isinstance(read, dict):
        raise BadCheckpoint(f"{path}: a JSON object is expected, found {type(read).__name__}")
    return cast("dict[str, Any]", read)


def try_folder(path: Path, option: str) -> None:
    """Try what will be done: make the folder and a file in it; then take both away again. Raises `ConfigError`."""
    made = [f for f in (path, *path.parents) if not f.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        why = "a file is in the way" if in_the_way else error.strerror or str(error)
        raise ConfigError(f"{option} {str(path)!r} cannot be written: {why}. Fix: choose another folder") from error
    finally:
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()

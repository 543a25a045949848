"""From the paths a user names to data files: files, folders, data sets already in the local cache. No network, ever."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from trimtab.data.problems import Problems

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# a folder holding these beside training rows would silently train on what is meant to test the result
_HELD_OUT = re.compile(r"(valid|validation|val|dev|test|eval)([-_.]|$)", re.IGNORECASE)


def find(sources: Sequence[str | Path], problems: Problems) -> list[tuple[str, Path]]:
    """`(name shown to the user, path)` of every data file, in the order given; a folder's files are sorted by name."""
    found: list[tuple[str, Path]] = []
    if isinstance(sources, (str, Path)):
        sources = [sources]
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found += _folder(str(source), path, problems)
        elif path.is_file():
            if path.suffix.lower() in SUFFIXES:
                found.append((str(source), path))
            else:
                _unknown_suffix(str(source), path, problems)
        elif (cached := _cached(str(source), problems)) is not None:
            found += cached
        else:
            _missing(str(source), path, problems)
    if not sources:
        problems.add("dataset", 0, "", "no file or folder was named", f"name at least one {_kinds()} file or a folder")
    return found


def _folder(name: str, path: Path, problems: Problems) -> list[tuple[str, Path]]:
    """The data files directly in a folder. `dataset_info.json` and hidden files describe data, they are not rows."""
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and p.name[0] != ".")
    files = [p for p in files if not p.name.startswith("dataset_info")]
    held_out = [p.name for p in files if _HELD_OUT.match(p.name)]
    if not files:
        names = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        problems.add(name, 0, "", f"the folder holds no {_kinds()} file; found {names}", "name the folder of the files",
                     "a folder without data files")
    elif held_out and len(held_out) < len(files):
        problems.add(name, 0, "", f"the folder mixes training rows with rows held out ({', '.join(held_out)})",
                     "name the files: the training files as the data set, the others as val_dataset",
                     "a folder with training and validation files")
    return [(str(Path(name) / p.name), p) for p in files]


def _unknown_suffix(name: str, path: Path, problems: Problems) -> None:
    fix = f"convert it to {_kinds()}"
    if path.suffix.lower() in (".txt", ".md"):
        fix = 'write one JSON object {"text": ...} a line into a .jsonl file'
    elif path.suffix.lower() in (".gz", ".zip", ".zst", ".xz", ".bz2"):
        fix = "unpack it first"
    problems.add(name, 0, "", f"{path.suffix or 'no suffix'}: not a data file that can be read", fix, "unknown suffix")


def _missing(name: str, path: Path, problems: Problems) -> None:
    tried = [str(path.absolute()), *(str(p) for p in _cache_folders(name))]
    close = [p.name for p in path.parent.glob(f"{path.stem[:4]}*")][:3] if path.parent.is_dir() and path.stem else []
    hint = f" (near it: {', '.join(close)})" if close else ""
    problems.add(name, 0, "", f"no such file or folder{hint}; tried {', '.join(tried)}",
                 "check the path; no network is used, so a hub data set must already be in the local cache",
                 "no such file or folder")


def _cache_folders(name: str) -> list[Path]:
    """Where `datasets` (prepared) and `huggingface_hub` (downloaded) keep a data set called `owner/name`."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or name.lower().endswith(SUFFIXES):
        return []
    from datasets import config
    from huggingface_hub import constants

    owner, _, short = name.partition("/")
    return [
        Path(config.HF_DATASETS_CACHE) / f"{owner}___{short.lower()}",
        Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{short}" / "snapshots",
    ]


def _cached(name: str, problems: Problems) -> list[tuple[str, Path]] | None:
    """The training files of a hub data set in the local caches: prepared Arrow files, else downloaded ones; None: not there.

    Of several revisions it is the one that the hub's `main` was when it was last asked. Several configurations, or rows
    that are all held out, are a problem: nobody said which.
    """
    for folder in _cache_folders(name):
        folder = _revision(folder)
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".arrow", *SUFFIXES) and p.is_file())
        files = [p for p in files if not p.name.startswith(("dataset_info", "cache-"))]
        if not files:
            continue
        splits = {p: _split(p.relative_to(folder).parts) for p in files}
        chosen = [p for p in files if splits[p] == "train"] or [p for p in files if splits[p] == ""]
        fix = f"give the path of the files; they are in {folder}"
        if not chosen:
            problems.add(name, 0, "", "only rows that are held out are in the local cache", fix, "held out rows alone")
            return []
        kinds = {"/".join(part for part in p.relative_to(folder).parts[:-1] if not _split((part,))) for p in chosen}
        if len(kinds) > 1:
            several = f"several configurations or revisions are in the local cache: {', '.join(sorted(kinds))}"
            problems.add(name, 0, "", several, fix, "several configurations in the cache")
            return []
        return [(f"{name}/{p.relative_to(folder).as_posix()}", p) for p in chosen]
    return None


def _revision(folder: Path) -> Path:
    """Of a folder of snapshots the one that `refs/main` names, or the only one."""
    if folder.name != "snapshots" or not folder.is_dir():
        return folder
    main, there = folder.parent / "refs" / "main", [f for f in folder.iterdir() if f.is_dir()]
    named = [f for f in there if main.is_file() and f.name == main.read_text().strip()] or there
    return named[0] if len(named) == 1 else folder


def _split(parts: tuple[str, ...]) -> str:
    """`train`, `held out`, or empty where a path does not tell."""
    words = [word.lower() for part in parts for word in re.split(r"[-_.]", part)]
    if "train" in words:
        return "train"
    return "held out" if any(_HELD_OUT.fullmatch(word) for word in words) else ""


def _kinds() -> str:
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"

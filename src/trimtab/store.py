"""Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, as the field publishes them.

Keys are `base_model.model.<path>.<tensor>` with no adapter name in them; what an adapter shares between its sites stands at
`base_model.<tensor>`; a prompt method's table is `prompt_embeddings`. Reading is strict, writing is atomic and re-read.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.core.config import CONFIG_FILE, PeftConfig, method_of
from trimtab.core.group import Group
from trimtab.core.sites import at, frozen, layers, matches
from trimtab.errors import BadCheckpoint
from trimtab.files import write
from trimtab.headers import damaged, header

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ROOT = "base_model."
PREFIX = "base_model.model."
# under which other tools write the whole weight of a frozen layer, behind its path
FROZEN = ("token_adapter.base_layer.weight", "base_layer.weight", "original_module.weight", "weight")


@dataclass
class LoadReport:
    """What a load did. `missing_keys` the adapter has and the file lacks; `unexpected_keys` the other way round."""

    loaded: list[str] = field(default_factory=list)
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        rows = [
            ("missing", self.missing_keys),
            ("unexpected", self.unexpected_keys),
            ("of another shape", self.mismatched_keys),
        ]
        return [
            f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
            for what, keys in rows
            if keys
        ]


def live(group: Group) -> dict[str, Tensor]:
    """The adapter's own tensors by their published keys."""
    if group.adapter is None:
        return {_key(path, name): tensor for path, name, tensor in group.tensors()}
    heads = {f"{ROOT}{path}.{name}": tensor for path, name, tensor in group.tensors()}  # prompt files have one level less
    return dict(group.adapter.tensors()) | heads


def state(group: Group, values: Mapping[int, Tensor] | None = None) -> dict[str, Tensor]:
    """What the file holds: published keys and detached tensors. `values`: gathered ones by the id of the parameter they
    stand for."""
    found = {k: (values or {}).get(id(t), t).detach() for k, t in live(group).items()}
    return found if group.adapter is not None else _formed(group, method_of(group.config).adapter.pack, found)


def _formed(group: Group, form: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the method's form for files, or back. A method sees (path, name); no path is the root."""
    own: dict[tuple[str, str], Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        inner = key.removeprefix(PREFIX)
        if path := max((p for p in group.layers if inner.startswith(f"{p}.")), key=len, default=""):
            own[path, inner[len(path) + 1 :]] = tensor
        elif inner == key and key.startswith(ROOT):
            own["", key.removeprefix(ROOT)] = tensor
        else:
            rest[key] = tensor
    return rest | {_key(*k): t for k, t in form(group, own).items()}


def _key(path: str, name: str) -> str:
    return f"{PREFIX}{path}.{name}" if path else f"{ROOT}{name}"


# -- reading ----------------------------------------------------------------------------------------------------------
def folder(name: str | Path, subfolder: str | None = None) -> Path:
    """The adapter folder that `name` means: itself, or a hub id's snapshot in the local cache. Nothing is downloaded."""
    path = Path(name).expanduser()
    if not path.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(str(name), local_files_only=True))
        except LocalEntryNotFoundError:
            raise BadCheckpoint(
                f"no adapter folder {str(name)!r} is here, and the local cache has none of that name"
            ) from None
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise BadCheckpoint(f"subfolder {subfolder!r} lies outside of {path}")
    path = path / (subfolder or "")
    if not path.is_dir():
        raise BadCheckpoint(f"no adapter folder {str(path)!r}")
    if not (path / CONFIG_FILE).is_file():
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_FILE}"))
        more = f" Adapters inside it: {', '.join(inside[:8])}" if inside else ""
        raise BadCheckpoint(f"no {CONFIG_FILE} in {path}: it is no adapter folder.{more}")
    return path


def read(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of an adapter folder. Pickle can run code, so it is read only where that is asked for."""
    file, pickled = path / WEIGHTS_FILE, path / PICKLE_FILE
    if file.is_file():
        need, there = sum(c.end - c.begin for c in header(file).values()), memory()
        if need > there:  # a file may have holes: a claim that adds up is not yet one to allocate
            raise BadCheckpoint(f"{file} claims {need:,} bytes of tensors; this machine has {there:,} bytes of memory")
        try:
            with safe_open(file, framework="pt") as opened:
                return {k: opened.get_tensor(k) for k in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise damaged(file, str(error)) from None
    if not pickled.is_file():
        raise BadCheckpoint(f"no {WEIGHTS_FILE} in {path}")
    if not allow_pickle:
        raise BadCheckpoint(
            f"{pickled} is a pickle, which can run code when it is opened. If you trust it, convert it once: "
            f"safetensors.torch.save_file(torch.load({PICKLE_FILE!r}, weights_only=True), {WEIGHTS_FILE!r}); or read it as "
            "it is: --allow_pickle, in Python allow_pickle=True"
        )
    try:
        read: Any = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling may raise is up to the file
        raise BadCheckpoint(f"{pickled} cannot be read ({type(error).__name__}: {str(error)[:200]})") from None
    if not isinstance(read, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in read.items()):
        raise BadCheckpoint(f"{pickled} does not hold tensors by name")
    return read


def memory() -> int:
    """Bytes of this machine's memory, where it tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**63


def saved_whole(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """`modules_to_save` as published files mean it: any module whose path ends in the letters of a name, where the file
    holds it (`pre_classifier` for `classifier`). Those are added by their full path."""
    modules = dict(layers(model))
    found: list[str] = []
    for asked in getattr(config, "modules_to_save", None) or []:
        ending = [name for name in modules if name.endswith(asked) and not matches(name, [asked])]
        if not ending or any(matches(name, [asked]) for name in modules):
            found.append(asked)
        for name in ending:
            whole = frozen(modules[name]).state_dict()
            found += [name] if whole and all(f"{PREFIX}{name}.{k}" in tensors for k in whole) else []
    return found


def load(
    model: nn.Module,
    group: Group,
    tensors: Mapping[str, Tensor],
    *,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    source: str = "",
) -> LoadReport:
    """Copy a file's tensors into an adapter. strict: any key that is missing, unexpected or mis-shaped raises, and
    nothing is changed. Full copies of frozen embeddings, which other tools write, must equal the model's."""
    own, report, chosen = live(group), LoadReport(), {}
    given = {_normal(k, own): v for k, v in tensors.items()}
    if group.adapter is None:
        given = _formed(group, method_of(group.config).adapter.unpack, given)
        own = live(group)
    for key, value in given.items():
        if key not in own:
            if not _same_as_base(model, key, value) and not _twice(model, key, value, given):
                report.unexpected_keys.append(key)
        elif tuple(own[key].shape) != tuple(value.shape):
            report.mismatched_keys.append(f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}")
        else:
            chosen[key] = value
    read = {_place(own[k]) for k in chosen} - {None}
    report.missing_keys = [k for k in own if k not in given and _place(own[k]) not in read]
    report.loaded = list(chosen)
    report.mismatched_keys += _torn(own, chosen)
    bad = report.missing_keys or report.unexpected_keys or (report.mismatched_keys and not ignore_mismatched_sizes)
    if strict and bad:
        raise BadCheckpoint(_message(group, own, report, source))
    with torch.no_grad():
        if group.adapter is not None and (prompt := {k: v for k, v in chosen.items() if k in group.adapter.tensors()}):
            group.adapter.load(prompt)
            chosen = {k: v for k, v in chosen.items() if k not in prompt}
        for key, value in chosen.items():
            own[key].copy_(value)
    return report


def _place(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Where its numbers are: tensors that are tied have them in one place."""
    return (tensor.device, tensor.data_ptr()) if tensor.numel() and not tensor.is_meta else None


def _torn(own: Mapping[str, Tensor], chosen: dict[str, Tensor]) -> list[str]:
    """Keys of one tensor, straight or transposed, to which a file gives different values."""
    found: list[str] = []
    seen: dict[Any, tuple[str, Tensor]] = {}
    for key, value in chosen.items():
        first, same = seen.setdefault(_place(own[key]) or key, (key, value))
        if same is not value and not torch.equal(same if same.shape == value.shape else same.T, value):
            found.append(f"{key} is tied to {first}, and the file holds another value for it")
    return found


def _normal(key: str, own: Mapping[str, Tensor]) -> str:
    """Injected models' files have no prefix."""
    return key if key in own or f"{PREFIX}{key}" not in own else f"{PREFIX}{key}"


def _weight(model: nn.Module, key: str, suffix: str) -> Any:
    """The frozen weight of the layer whose tensor `suffix` a key names."""
    try:
        return getattr(frozen(at(model, key.removeprefix(PREFIX).removesuffix(f".{suffix}"))), "weight", None)
    except AttributeError:
        return None


def _twice(model: nn.Module, key: str, value: Tensor, given: Mapping[str, Tensor]) -> bool:
    """Whether a file, as other tools write them, holds under `key` what it holds under another one too: a copy of a module,
    and rows that tied layers share."""
    names = [name] if (name := key.replace(".modules_to_save.", ".")) != key and name in given else list[str]()
    rows = "token_adapter.trainable_tokens_delta"
    if key.endswith(rows) and (weight := _weight(model, key, rows)) is not None:
        names += [k for k in given if k != key and k.endswith(rows) and _weight(model, k, rows) is weight]
    return any(torch.equal(given[k], value) for k in names)


def _same_as_base(model: nn.Module, key: str, value: Tensor) -> bool:
    suffix = next((s for s in FROZEN if key.endswith(f".{s}")), "")
    weight = _weight(model, key, suffix)
    same = isinstance(weight, Tensor) and suffix != "" and weight.shape == value.shape
    return same and torch.equal(weight.to(value.device, value.dtype), value)


def _message(group: Group, own: Mapping[str, Tensor], report: LoadReport, source: str) -> str:
    odd = next(iter(report.unexpected_keys), "")
    near = difflib.get_close_matches(odd, list(own), n=1) if odd else []
    base = group.config.base_model_name_or_path
    return (
        f"{source or 'these tensors'} do not fit adapter {group.name!r} on this model; nothing was loaded.\n  "
        + "\n  ".join(report.problems())
        + (f"\n  nearest key of this model: {near[0]}" if near else "")
        + f"\n  Fix: take the model that it was made for{f', {base!r}' if base else ''}; in Python, strict=False loads what "
        + "fits and returns a report"
    )


# -- writing ----------------------------------------------------------------------------------------------------------
def save(path: Path, group: Group, values: Mapping[int, Tensor] | None = None) -> None:
    """Write an adapter."""
    config = group.config if group.adapter is not None else method_of(group.config).adapter.filed(group)
    put(path, state(group, values), config)


def put(path: Path, published: Mapping[str, Tensor], config: PeftConfig) -> None:
    """Write config and tensors, each in one step, and read the tensors back."""
    tensors, seen = {}, set()
    for key, tensor in published.items():
        tensor = tensor.cpu().contiguous()
        if tensor.is_meta or tuple(tensor.shape) == (0,):
            raise BadCheckpoint(
                f"{key} has no values here (its weights are sharded or on another device); nothing was written"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadCheckpoint(f"{key} holds values that are not finite; nothing was written")
        tensors[key] = tensor.clone() if tensor.data_ptr() in seen else tensor  # the format refuses shared memory
        seen.add(tensor.data_ptr())
    write(path / WEIGHTS_FILE, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    config.save_pretrained(path)
    for key, value in read(path).items():
        if not torch.equal(value.view(torch.uint8), tensors.pop(key).view(torch.uint8)):
            raise BadCheckpoint(f"{path / WEIGHTS_FILE}: {key} reads back differently; the disk or memory is failing")
    assert not tensors, f"not written: {list(tensors)[:3]}"

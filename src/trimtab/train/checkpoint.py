"""What a checkpoint holds beside the adapter, so that a resumed run continues exactly, or refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.core.adapter import Adapter
from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.files import write, write_text
from trimtab.train.audits import of, trainable

TENSORS = "trainable.safetensors"
RECORD = "trimtab_state.json"
STATE = "trainer_state.json"  # transformers writes it last


@dataclass
class Counts:
    """What a run has seen and computed so far."""

    examples: int = 0
    tokens: int = 0  # the examples' lengths
    computed: int = 0  # positions that went through the model: with padding, less what is shared
    supervised: int = 0
    seconds: float = 0.0  # in training, evaluations aside

    def add(self, more: Counts) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(more, field.name))


def kept(model: nn.Module) -> dict[str, Tensor]:
    """What a resumed run needs, by its name in the model: what is trained, and what methods remember from step to step."""
    found: dict[str, Tensor] = dict(trainable(model))
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            found |= {f"{path}.{name}": attrgetter(name)(module) for name in module.remembers}
    return found


def save_tensors(model: nn.Module, folder: Path) -> None:
    """All that is kept, exactly. The adapter's own file may hold a form for inference."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in kept(model).items()}
    write(folder / TENSORS, lambda path: save_file(tensors, path))


def load_tensors(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's tensors back in place. The set of names and the shapes must be the same."""
    path = folder / TENSORS
    if not path.is_file():
        raise BadCheckpoint(f"{folder} has no {TENSORS}: it is not a checkpoint of a trimtab run")
    try:
        saved: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors raises its own bare type
        raise BadCheckpoint(f"{path} cannot be read: {error}") from error
    here = kept(model)
    wrong = [f"missing there: {name}" for name in here.keys() - saved.keys()]
    wrong += [f"only there: {name}" for name in saved.keys() - here.keys()]
    wrong += [
        f"{name}: {tuple(saved[name].shape)} there, {tuple(here[name].shape)} here"
        for name in here.keys() & saved.keys()
        if saved[name].shape != here[name].shape
    ]
    if wrong:
        raise BadCheckpoint(f"{folder} trained other tensors than this run. " + "; ".join(sorted(wrong)[:5]))
    with torch.no_grad():
        for name, p in here.items():
            p.copy_(saved[name])


def write_record(folder: Path, run: dict[str, Any], counts: Counts) -> None:
    write_text(folder / RECORD, json.dumps({"run": run, "counts": dataclasses.asdict(counts)}, indent=2) + "\n")


def read_record(folder: Path, run: dict[str, Any]) -> Counts:
    """The counts at the checkpoint; raises, naming the differences, where it belongs to another run than `run`."""
    try:
        saved = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{folder / RECORD} cannot be read ({error}): not a checkpoint of a trimtab run?"
        ) from error
    there = saved["run"]
    keys = sorted(there.keys() | run.keys())
    changed = [f"{k}: {there.get(k)} there, {run.get(k)} here" for k in keys if there.get(k) != run.get(k)]
    if changed:
        raise BadCheckpoint(
            f"{folder} cannot be continued, because the run has changed: {'; '.join(changed)}. "
            f"Give the same options and rows, or start a new run from its weights: --init_adapter {folder}"
        )
    return Counts(**saved["counts"])


def fingerprint(examples: Iterable[Any]) -> str:
    """A hash over the token ids and labels of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for field in ("input_ids", "labels"):
            digest.update(array("q", list(of(example, field) or ())).tobytes() + b"/")
    return digest.hexdigest()


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a finished folder to its name; one of that name that is there already goes only then."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def steps(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [f for f in output_dir.glob("checkpoint-*") if f.name[11:].isdigit() and (f / STATE).is_file()]
    return sorted(found, key=lambda f: int(f.name[11:]))


def to_resume(asked: str, output_dir: Path) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or the newest of the run for `last`."""
    found = steps(output_dir)
    if asked == "last":
        if not found:
            raise ConfigError(
                f"resume_from_checkpoint last: {output_dir} holds no complete checkpoint (set --save_steps)"
            )
        return found[-1]
    folder = Path(asked).expanduser()
    if not (folder / STATE).is_file():
        known = f" Checkpoints of {output_dir}: {', '.join(f.name for f in found)}." if found else ""
        raise ConfigError(f"resume_from_checkpoint {asked!r} is not a complete checkpoint folder.{known}")
    return folder

"""The folder of a checkpoint: it appears whole, is read back before it counts, and the newest good one is never taken away.

It is written as `.checkpoint-8.partial` and renamed when each file is on the disk and reads as it should; one that is
replaced or removed leaves its name first, in one step. So a folder called `checkpoint-8` is whole, or a file of it was
damaged later, which its size or its hash in `trimtab_state.json` tells.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, ModelAdapter
from trimtab.errors import BadCheckpoint, ConfigError, TrainingError, TrimtabWarning
from trimtab.files import sync, write, write_text
from trimtab.train.audits import trainable
from trimtab.train.batches import rank

TENSORS = "trainable.safetensors"
RECORD = "trimtab_state.json"
STATE = "trainer_state.json"
NAME = "checkpoint-"


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


# ---- tensors


def kept(model: nn.Module) -> dict[str, Tensor]:
    """What a resumed run needs, by its name in the model: what is trained, what else its adapters hold (frozen random
    factors, indices), and what methods remember from step to step."""
    found: dict[str, Tensor] = dict(trainable(model))
    seen = {id(t) for t in found.values()}
    for path, module in model.named_modules():
        if isinstance(module, Adapter | ModelAdapter) and any(p.requires_grad for p in module.parameters()):
            own = module.state_dict(keep_vars=True) | {n: attrgetter(n)(module) for n in getattr(module, "remembers", ())}
            for name, tensor in own.items():
                if id(tensor) not in seen:  # what sites share is a child of each
                    found[f"{path}.{name}"] = tensor
                    seen.add(id(tensor))
    return found


def save_tensors(model: nn.Module, folder: Path) -> None:
    """All that is kept, exactly. The adapter's own file may hold a form for inference."""
    here = kept(model)
    if broken := [name for name in trainable(model) if not here[name].isfinite().all()]:
        raise TrainingError(
            f"{', '.join(broken[:5])} ({len(broken)} tensors) hold values that are not finite; no checkpoint was written"
        )
    write_tensors(folder / TENSORS, here)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write, and read back: bytes that differ are an error."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write(path, lambda temporary: save_file(plain, temporary))
    again = read_tensors(path)
    wrong = [n for n in plain.keys() | again.keys() if n not in again or n not in plain or not same(plain[n], again[n])]
    if wrong:
        raise BadCheckpoint(f"{path}: {sorted(wrong)[0]} reads back differently; the disk or memory is failing")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Copies: what is mapped would keep the file in use, and Windows moves and removes no such file."""
    try:
        return {name: t.clone() for name, t in load_file(path).items()}
    except Exception as error:  # safetensors raises its own bare type
        raise BadCheckpoint(f"{path} cannot be read: {error}") from error


def same(a: Tensor, b: Tensor) -> bool:
    """Byte for byte, NaNs included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def load_tensors(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's tensors back in place. The set of names, the shapes and the dtypes must be the same."""
    path = folder / TENSORS
    if not path.is_file():
        raise BadCheckpoint(f"{folder} has no {TENSORS}: it is not a checkpoint of a trimtab run")
    saved, here = read_tensors(path), kept(model)
    wrong = [f"missing there: {name}" for name in here.keys() - saved.keys()]
    wrong += [f"only there: {name}" for name in saved.keys() - here.keys()]
    for name in here.keys() & saved.keys():
        there, own = ((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in (saved[name], here[name]))
        if there != own:
            at = 0 if there[0] != own[0] else 1
            wrong.append(f"{name}: {there[at]} there, {own[at]} here")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise BadCheckpoint(f"{folder} trained other tensors than this run. " + "; ".join(sorted(wrong)[:5]) + more)
    with torch.no_grad():
        for name, p in here.items():
            p.copy_(saved[name])


# ---- the folder


def partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Have all files of a folder on the disk, and write down what they are: the record is the last of them."""
    files = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != RECORD):
        sync(file)
        files[file.relative_to(folder).as_posix()] = [file.stat().st_size, digest(file)]
    write_text(folder / RECORD, json.dumps(record | {"files": files}, indent=1) + "\n")
    if (bad := damage(folder)) is not None:
        raise BadCheckpoint(f"{folder / bad} reads back differently; the disk or memory is failing")


def digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record | {"run": record["run"], "files": record["files"], "counts": Counts(**record["counts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{folder / RECORD} cannot be read ({error}): not a checkpoint of a trimtab run?") from error


def damage(folder: Path, *, thorough: bool = True) -> str | None:
    """The file of a checkpoint that is not what its record says; None: it is whole. Not thorough: looks at sizes alone."""
    try:
        files: dict[str, list[Any]] = read_record(folder)["files"]
    except BadCheckpoint:
        return RECORD
    for name, (size, hashed) in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or (thorough and digest(file) != hashed):
            return name
    return None


def put_in_place(finished: Path, final: Path) -> None:
    """Rename a finished folder to its name; one of that name that is there already goes only then."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        remove(old)
        final.rename(old)
    finished.rename(final)
    sync(final.parent)
    remove(old)


def remove(folder: Path) -> None:
    """A folder that is being emptied has no checkpoint's name any more."""
    if not folder.exists():
        return
    gone = folder.with_name(f".{folder.name.strip('.')}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def tidy(output_dir: Path) -> None:
    """Finish what a kill interrupted: a checkpoint that was about to be replaced gets its name back, leftovers go."""
    for old in output_dir.glob(f".{NAME}*.old"):
        final = output_dir / old.name[1:-4]
        remove(old) if final.exists() else old.rename(final)
    for ending in ("partial", "gone"):
        for left in output_dir.glob(f".{NAME}*.{ending}"):
            shutil.rmtree(left, ignore_errors=True)


def retain(output_dir: Path, limit: int | None, *keep: Path | None) -> None:
    """Remove the oldest whole checkpoints beyond `limit`, never one of `keep`: the one just written, and the best."""
    found = steps(output_dir)
    spare = [f for f in found if f not in keep]
    for folder in spare[: max(0, len(found) - limit)] if limit and limit > 0 else ():
        remove(folder)


def steps(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [f for f in output_dir.glob(f"{NAME}*") if f.name.removeprefix(NAME).isdigit()]
    whole = [f for f in found if damage(f, thorough=False) is None]
    return sorted(whole, key=lambda f: int(f.name.removeprefix(NAME)))


def to_resume(asked: str, output_dir: Path) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or the newest good one of the run for `last`."""
    if rank() == 0:
        tidy(output_dir)
    found = steps(output_dir)
    if asked != "last":
        folder = Path(asked).expanduser()
        bad = damage(folder)
        if bad == RECORD and not (folder / RECORD).is_file():
            known = f" Checkpoints of {output_dir}: {', '.join(f.name for f in found)}." if found else ""
            raise ConfigError(f"resume_from_checkpoint {asked!r} is not a complete checkpoint folder.{known}")
        if bad is not None:
            raise ConfigError(f"resume_from_checkpoint {asked!r}: {bad} is damaged. Fix: `last` takes the newest good one")
        return folder
    for folder in reversed(found):
        if (bad := damage(folder)) is None:
            return folder
        warnings.warn(f"{folder.name} is passed over: {bad} is damaged", TrimtabWarning)
    raise ConfigError(f"resume_from_checkpoint last: {output_dir} holds no complete checkpoint (set --save_steps)")

"""What must be the same for a run to be continued, and how what is not is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimtab.core.group import Group
from trimtab.errors import BadCheckpoint
from trimtab.train.audits import of

SCHEDULE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed", "train_sampling_strategy", "fp16", "bf16"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
)
# of an adapter's config: where it lies and whether it is in training, not what it is
APART = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
BLOCKS = 256  # the rows of a run are hashed in about so many parts, so that what changed can be found


def schedule(args: Any, steps: int, batch_size: int) -> dict[str, str]:
    run = {name: str(getattr(args, name, None)) for name in SCHEDULE}
    return run | {"steps": str(steps), "batch_size": str(batch_size)}


def adapters(groups: Iterable[Group]) -> dict[str, Any]:
    """The configs of the adapters that are trained, by name."""
    found = {}
    for group in groups:
        config = {k: v for k, v in group.config.to_dict().items() if k not in APART}
        found[group.name] = json.loads(json.dumps(config, default=str, sort_keys=True))
    return found


def template(tokenizer: Any) -> str | None:
    """The chat template that rows were rendered with."""
    text = getattr(tokenizer, "chat_template", None)
    return text if text is None or isinstance(text, str) else json.dumps(text, sort_keys=True)


def rows(dataset: Any) -> dict[str, Any] | None:
    """A hash over token ids and labels of each block of rows, in order. None where rows cannot be counted: a stream."""
    if not isinstance(dataset, Sized) or isinstance(dataset, Mapping):
        return None
    size, indexed = -(-len(dataset) // BLOCKS) or 1, cast(Any, dataset)
    if len(dataset) and of(indexed[0], "input_ids") is None:
        return {"rows": len(dataset), "block": size, "hashes": []}  # images, sounds: reading all of them takes long
    return {"rows": len(dataset), "block": size, "hashes": list(_hashes(dataset, size))}


def _hashes(dataset: Any, size: int) -> Iterator[str]:
    for start in range(0, len(dataset), size):
        digest = hashlib.sha256()
        for i in range(start, min(start + size, len(dataset))):
            example = dataset[i]
            for field in ("input_ids", "labels"):
                value = of(example, field)
                numbers = np.asarray([] if value is None else value)
                digest.update((numbers.astype(np.int64) if numbers.dtype.kind in "iub" else numbers).tobytes() + b"/")
        yield digest.hexdigest()[:16]


def compare(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], datasets: Mapping[str, Any]) -> None:
    """Raise, naming each difference, where the checkpoint `folder` belongs to another run."""
    changed = [f"{key}: {there['schedule'].get(key)} there, {value} here" for key, value in here["schedule"].items()
               if there["schedule"].get(key) != value]  # fmt: skip
    changed += _adapters(there["adapters"], here["adapters"])
    if there["template"] != here["template"]:
        changed.append(_template(there["template"], here["template"]))
    for name, dataset in datasets.items():
        changed += _rows(name, there.get(name), here.get(name), dataset)
    if changed:
        raise BadCheckpoint(
            f"{folder} cannot be continued, because the run has changed: {'; '.join(changed)}. "
            f"Give the same options and rows, or start a new run from its weights: --init_adapter {folder}"
        )


def _adapters(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() ^ here.keys()):
        yield f"adapter {name!r} is trained {'there' if name in there else 'here'} alone"
    for name in sorted(there.keys() & here.keys()):
        a, b = there[name], here[name]
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                yield f"{key} of adapter {name!r}: {a.get(key)} there, {b.get(key)} here"


def _template(there: str | None, here: str | None) -> str:
    if there is None or here is None:
        return f"template: there is one {'here' if there is None else 'there'} alone"
    at = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    line, start = there.count("\n", 0, at) + 1, max(0, at - 20)
    return f"template: line {line} reads {there[start:at + 20]!r} there, {here[start:at + 20]!r} here"


def _rows(name: str, there: Any, here: Any, dataset: Any) -> Iterator[str]:
    if there == here:
        return
    if there is None or here is None:
        yield f"{name}: {'none, or a stream,' if there is None else there['rows']} there, " \
              f"{'none, or a stream,' if here is None else here['rows']} here"  # fmt: skip
        return
    size = there["block"]
    mine = here["hashes"] if here["block"] == size else list(_hashes(dataset, size))
    first = next((i for i, (a, b) in enumerate(zip(there["hashes"], mine, strict=False)) if a != b), None)
    number = f"{there['rows']} there, {here['rows']} here"
    if first is None:
        yield f"{name}: {number}; the first {min(there['rows'], here['rows']):,} are the same"
        return
    span = range(first * size, min(first * size + size, here["rows"]))
    where = f"among {_place(dataset, span[0])} to {_place(dataset, span[-1])}" if len(span) > 1 else _place(dataset, span[0])
    yield f"{name}: {number}; the first that differs is {where}"


def _place(dataset: Sequence[Any], i: int) -> str:
    example = dataset[i]
    source = getattr(example, "source", None)
    return f"row {i + 1}" if source is None else f"{source}:{example.line}"

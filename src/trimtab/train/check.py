"""What can be known to be wrong before anything is loaded: all of it, together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trimtab import store
from trimtab.core.config import PeftConfig, config_class, config_for, method_of
from trimtab.data import Problems
from trimtab.data.sources import find
from trimtab.errors import ConfigError, TrimtabError, nearest
from trimtab.files import try_folder
from trimtab.model import checkpoint_activations, get_peft_model
from trimtab.train import batches, checkpoint, load, low_rank
from trimtab.train.folder import RESULTS
from trimtab.train.options import TrainOptions

AT_LEAST = {
    "batch_size": 1,
    "micro_batch_size": 1,
    "pack_tokens": 1,
    "max_length": 2,
    "max_train_samples": 1,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "val_size": 0,
    "seed": 0,
    "logging_steps": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "early_stopping_patience": 1,
    "loraplus_lr_embedding": 0,
    "riemannian_reg": 0,
    "stop_after_nonfinite": 1,
    "stall_seconds": 0,
}
# those of transformers that need no settings of their own
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
ABOVE_ZERO = {
    "learning_rate": "2e-4 suits most adapters of a model 4,096 wide",
    "num_train_epochs": "1 is one pass over the rows",
}


def check(options: TrainOptions) -> None:
    """Raise `ConfigError` with every problem of the options. Nothing is written, nothing is loaded."""
    problems = [*_missing(options), *_numbers(options), *_choices(options), *_evaluation(options)]
    unknown = [*_said(_model, options), *_said(_adapter, options)]
    problems += unknown or _said(_sites, options)
    for look in (_output, _start):
        problems += _said(look, options)
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems)} problems:\n  "
        raise ConfigError(head + "\n  ".join(problems))


def _said(look: Callable[[TrainOptions], None], options: TrainOptions) -> list[str]:
    try:
        look(options)
    except TrimtabError as problem:
        return [str(problem)]
    return []


def _missing(o: TrainOptions) -> Iterator[str]:
    if not o.dataset:
        yield "no dataset was given: --dataset FILE (.jsonl .json .csv .parquet)"
    problems = Problems()
    for paths in filter(None, (o.dataset, o.val_dataset)):
        find(paths, problems)
    yield from map(str, problems.found)


def _numbers(o: TrainOptions) -> Iterator[str]:
    for name, low in AT_LEAST.items():
        value = getattr(o, name)
        if value is not None and not (math.isfinite(value) and value >= low):
            yield f"{name} is {value}; it must be at least {low}"
    for name, usual in ABOVE_ZERO.items():
        value = getattr(o, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            yield f"{name} is {value}; it must be above 0 ({usual})"
    if not 0 <= o.warmup_ratio < 1:
        yield f"warmup_ratio is {o.warmup_ratio}; it is a share of the steps: at least 0, below 1"
    if o.verify_resume and batches.ranks() > 1:
        yield "verify_resume starts processes of its own, and is for a run in one process: leave it out here"
    if o.max_steps != -1 and o.max_steps < 1:
        yield f"max_steps is {o.max_steps}; it must be at least 1 (or -1: num_train_epochs decides)"
    share, rest = divmod(max(o.batch_size, 1), batches.ranks())
    if rest or not share:
        yield f"batch_size {o.batch_size} cannot be split evenly over {batches.ranks()} processes"
    elif o.micro_batch_size and o.micro_batch_size > 0 and share % o.micro_batch_size:
        known = ", ".join(str(d) for d in batches.divisors(share))
        yield f"micro_batch_size {o.micro_batch_size} does not divide batch_size {share}; these do: {known}"


def _choices(o: TrainOptions) -> Iterator[str]:
    from transformers.training_args import OptimizerNames

    hints = get_type_hints(TrainOptions)
    for field in fields(o):
        allowed, value = get_args(hints[field.name]), getattr(o, field.name)
        if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
            yield f"{field.name} {value!r} is not one of {', '.join(allowed)}.{nearest(str(value), allowed)}"
    if o.lr_scheduler_type not in SCHEDULES:
        known = f"{nearest(o.lr_scheduler_type, SCHEDULES)} Known: {', '.join(SCHEDULES)}"
        yield f"lr_scheduler_type {o.lr_scheduler_type!r} is not known.{known}"
    optimizers = [member.value for member in OptimizerNames]
    if o.optim not in optimizers and o.optim not in low_rank.OPTIONS:
        ours = f"{', '.join(low_rank.OPTIONS)}, or one of transformers' optimizers"
        yield f"optim {o.optim!r} is not {ours}.{nearest(o.optim, [*low_rank.OPTIONS, *optimizers])}"
    elif o.optim not in low_rank.OPTIONS and (why := _no_optimizer(o.optim)):
        yield f"optim {o.optim} is not to be had here: {why}"
    yield from _loggers(o.report_to)
    for name, own in low_rank.OPTIONS.items():
        for option in own if o.optim != name else {}:
            if getattr(o, option) is not None:
                yield f"{option} is an option of optim {name}, and optim is {o.optim}"


def _no_optimizer(name: str) -> str:
    """Why transformers cannot make that optimizer: a package that is missing, mostly."""
    import torch
    from transformers import Trainer, TrainingArguments

    try:
        args = object.__new__(TrainingArguments)  # its defaults alone: making one sets up devices and ranks
        args.optim = name
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    except (ImportError, ValueError, RuntimeError) as error:
        return str(error).strip().split("\n")[0]
    return ""


def _loggers(names: list[str]) -> Iterator[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    for name in names:
        if name in ("all", "none") and len(names) > 1:
            yield f"report_to {name!r} stands alone, or not at all"
        elif name not in (*KNOWN, "all", "none"):
            yield f"report_to {name!r} is not known.{nearest(name, KNOWN)} Known: {', '.join(KNOWN)}"
        elif name in KNOWN and name not in there:
            yield f"report_to {name}: it is not installed. Here: {', '.join(there) or 'none'}. metrics.jsonl is always written"


def _evaluation(o: TrainOptions) -> Iterator[str]:
    held_out = bool(o.val_dataset) or o.val_size > 0
    for name in ("eval_steps", "early_stopping_patience", "load_best_model_at_end"):
        if getattr(o, name) and not held_out:
            yield f"{name} needs rows that are held out: --val_size 0.05, or --val_dataset FILE"
    if o.load_best_model_at_end and o.save_steps and (not o.eval_steps or o.save_steps % o.eval_steps):
        yield (
            f"load_best_model_at_end with save_steps {o.save_steps} needs eval_steps that divide it (it is "
            f"{o.eval_steps}); or leave save_steps out: each best model is saved then"
        )


def _model(o: TrainOptions) -> None:
    load.model_folder(o.model)


def _adapter(o: TrainOptions) -> None:
    if o.init_adapter is None:
        config_for(o.adapter, **adapter_options(o))
        return
    folder = store.folder(o.init_adapter)
    known: Any = PeftConfig.from_pretrained(folder)
    method = method_of(known).name
    if o.adapter not in (method, TrainOptions.adapter):
        raise ConfigError(
            f"adapter {o.adapter} was asked for, and init_adapter {o.init_adapter} holds {method}: leave one of them out"
        )
    store.read(folder, allow_pickle=o.allow_pickle)  # a damaged file is found before the model is loaded
    there = {name: getattr(known, name, None) for name in o.adapter_options}
    changed = [f"{k}: {there[k]!r} there, {v!r} asked" for k, v in o.adapter_options.items() if there[k] != v]
    if changed:
        raise ConfigError(
            f"init_adapter {o.init_adapter} was made with other options ({'; '.join(changed)}); leave them out"
        )


def _sites(o: TrainOptions) -> None:
    """The adapter on the model's shape alone: a target that names nothing is found before weights are read."""
    if o.init_adapter is not None:
        return
    try:
        shape = load.skeleton(o.model, trust_remote_code=o.trust_remote_code)
        if o.gradient_checkpointing:
            checkpoint_activations(shape)  # which not every method goes with
    except Exception:  # code of the folder's own may want weights; loading them says what is wrong
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the run itself does it
        try:
            get_peft_model(shape, config_for(o.adapter, **adapter_options(o)))
        except NotImplementedError:  # torch's: a method that starts from the weights' values asked for them
            return


def adapter_options(o: TrainOptions) -> dict[str, Any]:
    """What the adapter's config is made of: ours where they are LoRA's and not said, then the user's."""
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
    ours = lora if config_class(o.adapter).peft_type == "LORA" else {}  # its variants are asked for by name, or by a switch
    return {"task_type": "CAUSAL_LM"} | ours | o.adapter_options


def _output(o: TrainOptions) -> None:
    out = Path(o.output_dir).expanduser()
    if (out / "config.json").is_file():  # its tokenizer would be overwritten, and the adapter would count as a part of it
        raise ConfigError(f"output_dir {o.output_dir!r} holds a model (config.json). Fix: choose another folder")
    for source in map(Path, (*o.dataset, *o.val_dataset)):
        inside = source.expanduser()
        if inside.is_dir() and inside.resolve() == out.resolve():  # metrics.jsonl and others would be rows of the next run
            raise ConfigError(f"output_dir {o.output_dir!r} is a folder of rows. Fix: choose another one, inside it or not")
        if inside.name in RESULTS and inside.resolve().parent == out.resolve():
            raise ConfigError(f"the rows {str(source)!r} have the name of a file that is written to output_dir: rename them")
    if batches.rank() == 0:  # ranks that try at once take each other's folder away
        try_folder(out, "output_dir")


def _start(o: TrainOptions) -> None:
    if o.resume_from_checkpoint is None:
        return
    if o.init_adapter is not None:
        raise ConfigError(
            "init_adapter starts a new run, resume_from_checkpoint continues an old one with all its state: choose one"
        )
    checkpoint.to_resume(o.resume_from_checkpoint, Path(o.output_dir).expanduser())

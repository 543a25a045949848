"""How a trainer writes a checkpoint and continues from one."""

# pyright: reportPrivateUsage=false
# (transformers' Trainer offers what a subclass needs under names with an underscore)
from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState

from trimtab.errors import BadCheckpoint, TrainingError, TrimtabWarning
from trimtab.files import write_text
from trimtab.train import checkpoint, same, state
from trimtab.train.checkpoint import Counts
from trimtab.train.finite import SkipCounts

OPTIMIZER = "optimizer.safetensors"
RANK = "rank_{}.json"  # what each process has of its own


def sharded(trainer: Any) -> bool:
    """Whether optimizer and weights are kept by DeepSpeed or FSDP, which have files of their own."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


# ---- writing


def save(trainer: Any, trial: Any) -> None:
    """Write `checkpoint-<step>` beside, read it back, rename it; only then may older ones go. Where it cannot be written,
    nothing of it is left, and what was there is still there."""
    trainer.store_flos()
    run_dir = Path(trainer._get_output_dir(trial=trial))
    final = run_dir / f"{checkpoint.NAME}{trainer.state.global_step}"
    partial, main = checkpoint.partial(final), trainer.args.should_save
    if main:
        checkpoint.tidy(run_dir)
    trainer.accelerator.wait_for_everyone()
    try:
        record = _fill(trainer, partial)
        trainer.accelerator.wait_for_everyone()
        if main:
            _save_trainer_state(trainer, partial, final)
            checkpoint.seal(partial, record)
            checkpoint.put_in_place(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) or "(os error" in str(error):  # the tokenizers' errors have no type
            raise _unwritten(final, error) from error
        raise
    if main:
        if trainer.args.push_to_hub:
            trainer._push_from_checkpoint(str(final))
        best = trainer.state.best_model_checkpoint
        checkpoint.retain(run_dir, trainer.args.save_total_limit, final, Path(best) if best else None)
    trainer.accelerator.wait_for_everyone()


def _unwritten(final: Path, error: BaseException) -> TrainingError:
    found = checkpoint.steps(final.parent)
    left = f"{found[-1].name} is whole" if found else "no earlier one is there"
    return TrainingError(
        f"{final} could not be written ({getattr(error, 'strerror', None) or error}); {left}. Fix: make room on the disk"
        + (", then continue with --resume_from_checkpoint last" if found else "")
    )


def _fill(trainer: Any, partial: Path) -> dict[str, Any]:
    """Everything but transformers' own state; returns what the record will say."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    trainer.save_model(str(partial), _internal_call=True)
    record: dict[str, Any] = {"run": trainer.signature(), "here": _conditions(trainer)}
    if not args.save_only_model:
        partial.mkdir(parents=True, exist_ok=True)
        if sharded(trainer):
            trainer._save_optimizer_and_scheduler(str(partial))
        elif args.should_save:
            tensors, about = state.optimizer_state(trainer.optimizer, model)
            checkpoint.write_tensors(partial / OPTIMIZER, tensors)
            record |= {"optimizer": about, "schedule": state.schedule_state(trainer.lr_scheduler)}
        record["scaler"] = state.scaler_state(getattr(trainer.accelerator, "scaler", None))
        own = {"random": state.random_state(args.device), "loss": trainer._tr_loss.item()}
        write_text(partial / RANK.format(args.process_index), json.dumps(own) + "\n")
    trainer._clock()
    record["counts"] = asdict(trainer.totals())
    record["progress"] = {
        "pack_tokens": trainer.packing and trainer.packing.tokens,  # memory may have halved it
        "logged": trainer._globalstep_last_logged,
    } | asdict(trainer.skipped.counts)
    if args.should_save:
        checkpoint.save_tensors(model, partial)
    return record


def _save_trainer_state(trainer: Any, partial: Path, final: Path) -> None:
    kept, best = trainer.state, final.with_name(f"{checkpoint.NAME}{trainer.state.best_global_step}")
    if best == final or best.is_dir():
        kept.best_model_checkpoint = str(best)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            kept.stateful_callbacks[type(callback).__name__] = callback.state()
    kept.save_to_json(os.fspath(partial / checkpoint.STATE))


def _conditions(trainer: Any) -> dict[str, Any]:
    """What decides how results are rounded, and nothing more: other ones are said, not refused."""
    args, packing = trainer.args, trainer.packing
    split = f"{args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps}"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": args.device.type,
        "ranks": args.world_size,
        "layout": f"{split}, padded" if packing is None else f"{split}, packs of at most {packing.rows or 'any'} rows",
    }


# ---- continuing


def load_weights(trainer: Any, folder: Path) -> None:
    """The tensors, into the model; refused where rows, template, options or adapter have changed."""
    record = checkpoint.read_record(folder)
    same.compare(folder, record["run"], trainer.signature(steps=False), _datasets(trainer))
    checkpoint.load_tensors(trainer.accelerator.unwrap_model(trainer.model), folder)


def load_state(trainer: Any, folder: Path) -> None:
    """Optimizer, schedule, counts; before the first step, once their objects are there."""
    record = checkpoint.read_record(folder)
    same.compare(folder, record["run"], trainer.signature(), _datasets(trainer))
    trainer.counts = record["counts"] if trainer.is_world_process_zero() else Counts()
    trainer._logged = replace(trainer.counts)
    trainer.skipped.counts = SkipCounts(record["progress"]["in_a_row"], record["progress"]["steps"])
    if "scaler" not in record:
        raise BadCheckpoint(
            f"{folder} holds weights alone (save_only_model), so the run cannot be continued from it. "
            f"Fix: start a new run from its weights: --init_adapter {folder}"
        )
    if not sharded(trainer):
        tensors, model = checkpoint.read_tensors(folder / OPTIMIZER), trainer.accelerator.unwrap_model(trainer.model)
        state.load_optimizer(trainer.optimizer, model, tensors, record["optimizer"])
        trainer.lr_scheduler.load_state_dict(record["schedule"])
    if record["scaler"] is not None and getattr(trainer.accelerator, "scaler", None) is not None:
        trainer.accelerator.scaler.load_state_dict(record["scaler"])
    _tell_conditions(trainer, folder, record)


def _tell_conditions(trainer: Any, folder: Path, record: dict[str, Any]) -> None:
    here, there = _conditions(trainer), record["here"]
    other = [f"{name}: {there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value]
    tokens = record["progress"]["pack_tokens"]
    if trainer.packing is not None and tokens is not None:
        if trainer.packing.tokens < tokens:
            other.append(f"packs of up to {tokens} tokens there, {trainer.packing.tokens} here")
        trainer.packing.tokens = min(trainer.packing.tokens, tokens)
    if other and trainer.is_world_process_zero():
        text = f"{folder.name} was written under other conditions ({'; '.join(other)}): results differ by rounding"
        warnings.warn(text, TrimtabWarning)


def load_random(trainer: Any, folder: Path) -> None:
    """Random numbers go on where they stood; a process more than there were has none to go on with."""
    if own := _own(trainer, folder):
        state.set_random_state(own["random"], trainer.args.device)


def load_progress(trainer: Any, folder: Path) -> None:
    """The part of the next logged loss that was summed up already. transformers begins it anew just before."""
    progress, own = checkpoint.read_record(folder)["progress"], _own(trainer, folder)
    trainer._globalstep_last_logged = progress["logged"]
    trainer._tr_loss = torch.full_like(trainer._tr_loss, own["loss"] if own else 0.0)


def _own(trainer: Any, folder: Path) -> dict[str, Any]:
    file = folder / RANK.format(trainer.args.process_index)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def signature(trainer: Any, adapters: dict[str, Any], *, steps: bool = True) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    run = same.schedule(trainer.args, trainer.state.max_steps, trainer.get_total_train_batch_size(trainer.args))
    run |= trainer.optim_said
    if not steps:
        run.pop("steps")  # not known before the data are laid out
    template = same.template(trainer.processing_class)
    return {"schedule": run, "adapters": adapters, "template": template} | trainer.rows_hashed


def rows_hashed(trainer: Any) -> dict[str, Any]:
    return {name: same.rows(dataset) for name, dataset in _datasets(trainer).items()}


def _datasets(trainer: Any) -> dict[str, Any]:
    return {"rows": trainer.train_dataset, "validation rows": trainer.eval_dataset}

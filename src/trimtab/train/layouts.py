"""Which layout a run takes: packs where the engine takes the model and the run, else padded batches; and the line that
says so."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sized
from typing import Any

from trimtab.data import Example
from trimtab.engine.forward import engine_for
from trimtab.errors import DataError
from trimtab.train.batches import Collator, Together, as_examples
from trimtab.train.objectives.sft import predicts_next
from trimtab.train.packing import Packing

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP shards the weights, and the loss reads the head by itself",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed shards the weights, and the loss reads the head by itself",
}
ROW = {"input_ids", "labels", "attention_mask"}  # what a row may hold of what a model takes


def launched() -> str:
    """Why a run that was started like this one takes padded batches; empty where it need not."""
    return next((f"padded batches: {why}" for name, why in SHARDED.items() if os.environ.get(name, "").lower() == "true"), "")


def settle(trainer: Any, packing: Packing | None, collator: Any, own: type) -> Packing | None:
    """The packing of a trainer whose caller gave this one and this collator (None: left to us), and its collator to match.

    Nothing happens to batches of a collator that makes tensors itself. own: the class whose steps know packs.
    """
    ours = collator is None and (trainer.decoder or predicts_next(trainer.base())) and _rows_are_plain(trainer)
    if not (ours or isinstance(collator, Together)):
        return packing
    why = _why_not(trainer, own)
    if not why and packing is None:
        engine, why = engine_for(trainer.base())
        packing = Packing(engine) if engine else None
        line = packing.line if packing else why
    else:
        line = why
    if why:
        packing = None
    trainer.data_collator = Together() if packing else Collator(pad_id(trainer))
    if line and trainer.is_world_process_zero():
        print(f"layout: {line}")
    return packing


def pad_id(trainer: Any) -> int:
    """Any id will do: masks are by position."""
    known = getattr(trainer.processing_class, "pad_token_id", None)
    return int(known) if isinstance(known, int) else 0


def _why_not(trainer: Any, own: type) -> str:
    """What of a run the engine would get wrong."""
    shards = max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
    changed = [n for n in ("compute_loss", "training_step") if getattr(type(trainer), n) is not getattr(own, n)]
    reasons = {
        "its loss is not the one that decoder models are trained with": not trainer.decoder,
        SHARDED["ACCELERATE_USE_FSDP"]: trainer.is_fsdp_enabled,
        SHARDED["ACCELERATE_USE_DEEPSPEED"]: trainer.is_deepspeed_enabled,
        f"{shards} ranks work on one row": shards > 1,
        "model_init makes another model later": trainer.model_init is not None,
        "NEFTune's noise depends on the length of a row": trainer.args.neftune_noise_alpha is not None,
        f"this Trainer has a {' and a '.join(changed)} of its own": bool(changed),
    }
    found = next((why for why, so in reasons.items() if so), "")
    return f"padded batches: {found}" if found else ""


def _rows_are_plain(trainer: Any) -> bool:
    """Whether rows hold ids and labels, and nothing else that the model would read."""
    dataset = trainer.train_dataset if trainer.train_dataset is not None else trainer.eval_dataset
    if not isinstance(dataset, Sized) or isinstance(dataset, Mapping) or not len(dataset):
        return False
    first = dataset[0]  # type: ignore[index]
    if isinstance(first, Example):
        return True
    if not isinstance(first, Mapping) or not {"input_ids", "labels"} <= first.keys():
        return False
    taken = inspect.signature(trainer.base().forward).parameters.keys()
    try:
        as_examples([first])
    except DataError:
        return False
    return not first.keys() & taken - ROW

"""What is checked before and at the first steps, so that a run that learns nothing stops at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.core.group import adapted, groups
from trimtab.errors import TrainingError, TrimtabWarning

OFTEN, SELDOM = 10, 50  # tensors that have not changed are looked at in each of the first steps, then now and then
NOTICEABLE = 1e-6  # gradients below this may move a weight by less than its rounding


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that a run trains, by name. None at all is an error."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise TrainingError(
            "the model has no trainable parameter, so training would change nothing. An adapter that was loaded is "
            "frozen unless it is asked for: PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    return found


def answering(model: nn.Module) -> None:
    """Raise where adapters are merged or switched off: they are trainable, and no gradient reaches them."""
    if merged := sorted({name for _, layer in adapted(model) for name in layer.merged_adapters}):
        raise TrainingError(f"{', '.join(merged)}: merged, so no gradient reaches it. Fix: unmerge_adapter() before training")
    if off := [name for name, group in groups(model).items() if group.disabled]:
        raise TrainingError(f"{', '.join(off)}: switched off. Fix: enable_adapter_layers() before training")


def labels_of(batch: Mapping[str, Any], rows: list[str]) -> Tensor:
    """The labels of a batch. Rows without any have nothing to learn from."""
    if batch.get("labels") is None:
        where = f" ({rows[0]})" if rows else ""
        raise TrainingError(
            f"a batch holds {', '.join(batch)} and no labels{where}. Fix: rows with labels (-100 where there is no loss), or "
            f"data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    return batch["labels"]


def some_labels(examples: Iterable[Any]) -> None:
    """Raise when there are examples with labels, and none of them supervises a token."""
    empty = 0
    for example in examples:
        labels = of(example, "labels")
        if labels is None or any(label != -100 for label in list(labels)[1:]):
            return
        empty += 1
    if empty:
        raise TrainingError(
            f"none of {empty} examples has a supervised token (every label is -100): nothing to learn from"
        )


def of(example: Any, field: str) -> Any:
    """A field of an example: of a row of a plain dataset, or of `trimtab.data.Example`."""
    return example.get(field) if isinstance(example, Mapping) else getattr(example, field, None)


class StepAudit(TrainerCallback):
    """At step 1 every trainable tensor has received a finite gradient. Each is watched until it has changed: the first step
    with a learning rate and a gradient that is not zero must do that (zero is right where a method starts with a zero
    factor). Those that a whole run left as they were are named at its end."""

    def __init__(self, skipped: Callable[[], bool] = lambda: False) -> None:
        self.skipped = skipped  # whether the step at hand is not taken
        self.first, self.steps = True, 0
        self.waiting: dict[str, Tensor] = {}  # tensors that have not changed yet, as they were
        self.moved: list[str] = []  # those of them that this step must change
        self.reached: set[str] = set()  # those that ever had a gradient, zero or not

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any
    ) -> None:
        if self.skipped() or not (self.first or self.waiting):
            return
        tensors = trainable(now["model"])
        if self.first:
            scaled = getattr(now["optimizer"], "scaler", None) is not None  # it meets infinities while it looks for its scale
            _received(tensors, resumed=state.global_step > 0, finite=not scaled)
            self.waiting = {name: p.detach().clone() for name, p in tensors.items()}
            self.first = False
        self.steps += 1
        self.moved = []
        if self._look() and min(group["lr"] for group in now["optimizer"].param_groups) > 0:  # warm-up may begin at zero
            with_grad = {name: p.grad for name in self.waiting if (p := tensors[name]).grad is not None}
            self.reached |= with_grad.keys()
            self.moved = [name for name, grad in with_grad.items() if _largest(grad) > NOTICEABLE]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any
    ) -> None:
        if self.skipped() or not (self.waiting and self._look()):
            return
        tensors = trainable(now["model"])
        still = {name: old for name, old in self.waiting.items() if torch.equal(old, tensors[name].detach())}
        taken = not getattr(now["optimizer"], "step_was_skipped", False)  # a float16 scaler looks for its scale
        stuck = [name for name in self.moved if taken and name in still]
        self.waiting = still
        if stuck:
            dtypes = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in stuck}))
            raise TrainingError(
                f"after an optimizer step {_named(stuck)} had not changed ({dtypes}), though the gradient is not zero. "
                f"Either the optimizer does not hold them, or the learning rate is below what {dtypes} can resolve"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        idle = [name for name in self.waiting if name in self.reached]
        if idle and self.steps >= OFTEN:
            warnings.warn(
                f"{_named(idle)} did not change in {self.steps} steps: their gradient was zero. Nothing that was trained "
                f"goes through them", TrimtabWarning
            )  # fmt: skip

    def _look(self) -> bool:
        return self.steps <= OFTEN or self.steps % SELDOM == 0


def _received(tensors: dict[str, nn.Parameter], *, resumed: bool, finite: bool) -> None:
    """A resumed run passed before; since then a budget may have put tensors to rest."""
    unused = [name for name, p in tensors.items() if p.grad is None]
    if unused and not resumed:
        raise TrainingError(
            f"{_named(unused)} received no gradient in step 1: the model's forward does not use them, so they would "
            f"never change. Is their module bypassed, or its weight read directly? Exclude it from the targets"
        )
    broken = [name for name, p in tensors.items() if p.grad is not None and not p.grad.isfinite().all()]
    if broken and finite:
        raise TrainingError(f"{_named(broken)} received a gradient that is not finite in step 1; no step was taken")


def _largest(grad: Tensor) -> float:
    return grad.abs().max().item() if grad.numel() else 0.0


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} of the trainable tensors ({', '.join(names[:5])}{more})"

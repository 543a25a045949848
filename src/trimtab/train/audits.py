"""What is checked before and at the first steps, so that a run that learns nothing stops at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.errors import TrainingError

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
    return example.get(field) if isinstance(example, Mapping) else getattr(example, field)


class StepAudit(TrainerCallback):
    """At step 1 every trainable tensor has received a finite gradient, and the first step that has a learning rate
    changes every tensor whose gradient is not zero (zero is right where a method starts with a zero factor)."""

    def __init__(self) -> None:
        self.first = True
        self.before: dict[str, Tensor] | None = None
        self.done = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any
    ) -> None:
        if self.done:
            return
        tensors = trainable(now["model"])
        if self.first:
            _received(tensors, resumed=state.global_step > 0)
            self.first = False
        if min(group["lr"] for group in now["optimizer"].param_groups) > 0:  # warm-up may begin at zero
            self.before = {
                name: p.detach().clone()
                for name, p in tensors.items()
                if p.grad is not None and _largest(p.grad) > NOTICEABLE
            }

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any
    ) -> None:
        if self.before is None:
            return
        skipped = getattr(now["optimizer"], "step_was_skipped", False)  # a float16 scaler looks for its scale
        tensors = trainable(now["model"])
        stuck = (
            [] if skipped else [name for name, old in self.before.items() if torch.equal(old, tensors[name].detach())]
        )
        self.before, self.done = None, not skipped
        if stuck:
            dtypes = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in stuck}))
            raise TrainingError(
                f"after an optimizer step {_named(stuck)} had not changed ({dtypes}), though the gradient is not zero. "
                f"Either the optimizer does not hold them, or the learning rate is below what {dtypes} can resolve"
            )


def _received(tensors: dict[str, nn.Parameter], *, resumed: bool) -> None:
    """A resumed run passed before; since then a budget may have put tensors to rest."""
    unused = [name for name, p in tensors.items() if p.grad is None]
    if unused and not resumed:
        raise TrainingError(
            f"{_named(unused)} received no gradient in step 1: the model's forward does not use them, so they would "
            f"never change. Is their module bypassed, or its weight read directly? Exclude it from the targets"
        )
    broken = [name for name, p in tensors.items() if p.grad is not None and not p.grad.isfinite().all()]
    if broken:
        raise TrainingError(f"{_named(broken)} received a gradient that is not finite in step 1; no step was taken")


def _largest(grad: Tensor) -> float:
    return grad.abs().max().item() if grad.numel() else 0.0


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} of the trainable tensors ({', '.join(names[:5])}{more})"

"""`trimtab.Trainer`: transformers' Trainer with a loss that does not depend on the split, checkpoints that hold the
adapter alone and resume exactly, evaluation that keeps no logits, and runs that stop when something is wrong."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from trimtab.core.group import Group, groups
from trimtab.data import Example
from trimtab.errors import TrainingError
from trimtab.model import PeftModel
from trimtab.train import checkpoint, layouts
from trimtab.train.audits import StepAudit, some_labels, trainable
from trimtab.train.batches import EXAMPLES, ROWS, Collator, Together
from trimtab.train.checkpoint import Counts
from trimtab.train.objectives.sft import predicts_next, row_losses, supervised, takes_positions
from trimtab.train.packing import Packing, remembered

SAME = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed")


class Trainer(transformers.Trainer):
    """The loss of an optimizer step is the sum over its supervised tokens / their number, over all micro-batches and
    ranks. Takes what `transformers.Trainer` takes; what is above holds for decoder models, others train as there.

    Rows of a decoder model that are `Example`s, or hold `input_ids` and `labels`, need no data_collator: they are laid out
    in packs, by `packing` where it is given, or padded where the engine does not take the model. One line says which.
    Batches of a data_collator of the caller's go through the model as they are.
    """

    model: Any
    accelerator: Any
    optimizer: Any

    def __init__(self, *args: Any, packing: Packing | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base: Any = self.base()
        another = self.compute_loss_func is not None or self.label_smoother is not None
        own = any(g.adapter is not None and g.adapter.own_loss for g in groups(base).values())
        self.decoder = not (another or own) and predicts_next(base)
        if own:  # a mean over tokens that no label of the batch tells
            self.model_accepts_loss_kwargs = False
        self._sparse = self.decoder and takes_positions(base.forward)
        if self.decoder:
            self.label_names = ["labels"]
            self.model_accepts_loss_kwargs = self._loss_shifts_labels = self.loss_is_scaled_for_ga = True
            self.args.average_tokens_across_devices = True
            self.args.logging_nan_inf_filter = False  # it would log the loss before instead
            self.args.restore_callback_states_from_checkpoint = True  # early stopping counts on after a resume
            self.args._n_gpu = min(self.args.n_gpu, 1)  # DataParallel would split a micro-batch behind our back
        given = args[2] if len(args) > 2 else kwargs.get("data_collator")
        self.packing = layouts.settle(self, packing, given, Trainer)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # which keep gradients where they cannot be read
            self.add_callback(StepAudit())
        self.add_callback(_AfterStep(self._live))
        self.counts = Counts()
        self._step_rows: list[str] = []
        self._logged = Counts()
        self._mark, self._paused = time.perf_counter(), 0.0
        self._rows_hash: str | None = None

    def base(self) -> nn.Module:
        """The torch model underneath: not wrapped for ranks, adapters in place."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    # ---- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        trainable(self.model)
        if self.decoder:
            some_labels(_items(self.train_dataset))
        self.counts, self._logged = Counts(), Counts()
        self._mark, self._paused = time.perf_counter(), 0.0
        result = super().train(*args, **kwargs)
        self._clock()
        return result

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if EXAMPLES not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        assert self.packing is not None
        model.train()
        examples: list[Example] = inputs[EXAMPLES]
        self._step_rows += [f"{e.source}:{e.line}" for e in examples]
        if num_items_in_batch is None:
            num_items_in_batch = _supervised(examples)
        if num_items_in_batch == 0:
            raise TrainingError(f"{self._at()}: no supervised token in the rows {_some(self._step_rows)}")
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free ones
            self.optimizer.train()
        alone = self.accelerator.num_processes == 1
        back = remembered(model, gradients=alone and self.current_gradient_accumulation_steps > 1)
        work = lambda: self._packs(model, examples, num_items_in_batch)  # noqa: E731
        loss, counts = self.packing.attempt(work, back, again=alone)
        self.counts.add(counts)
        return loss

    def _packs(self, model: nn.Module, examples: list[Example], total: Tensor | int) -> tuple[Tensor, Counts]:
        """Forward and backward of a step's examples, pack by pack; the loss, and what was computed."""
        assert self.packing is not None
        packs, seen = self.packing.packs(examples), Counts()
        done = torch.zeros((), device=self.args.device)
        for i, pack in enumerate(packs):
            last = i == len(packs) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    result = self.packing.engine.forward(model, pack)
                    self._finite(result.rows, [f"{examples[m].source}:{examples[m].line}" for m in pack.members])
                    loss = result.loss / total * self._ranks()
                    if last:
                        loss = loss + self._penalty()
                self.accelerator.backward(loss)
            done += loss.detach()
            seen.add(Counts(len(pack.members), pack.tokens, len(pack.input_ids), pack.supervised))
        return done, seen

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not batch_samples or EXAMPLES not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        mine = torch.tensor(sum(_supervised(batch[EXAMPLES]) for batch in batch_samples), device=device)
        return self.accelerator.gather(mine).sum() if self.args.world_size > 1 else mine

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0 if EXAMPLES in inputs else super().floating_point_ops(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = {k: v for k, v in inputs.items() if k != ROWS}
        if not self.decoder or return_outputs:
            return super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        rows = inputs.get(ROWS) or [f"row {i + 1} of the batch" for i in range(len(batch["labels"]))]
        self._step_rows += rows
        if num_items_in_batch is None:
            num_items_in_batch = supervised(batch["labels"]).sum()
        if num_items_in_batch == 0:
            raise TrainingError(f"{self._at()}: no supervised token in the rows {_some(self._step_rows)}")
        losses = row_losses(model, batch, sparse=self._sparse)
        self._finite(losses, rows)
        self._count(batch)
        loss = losses.sum() / num_items_in_batch * self._ranks()
        return loss + self._penalty() if model.training else loss

    def _ranks(self) -> int:
        return self.accelerator.num_processes // self.get_tp_size()  # the mean that DDP takes is to be a sum

    def _penalty(self) -> Tensor | float:
        """What the methods add to the loss: once a step, however it is split."""
        found = [p for group in self._live() if (p := group.penalty()) is not None]
        return sum(found) / self.current_gradient_accumulation_steps if found else 0.0

    def _live(self) -> list[Group]:
        return [group for group in groups(self.base()).values() if group.live]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        rows, self._step_rows = self._step_rows, []
        if norm is not None and self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            raise TrainingError(
                f"{self._at()}: the gradient's norm is {float(norm)} over the rows {_some(rows)}. No step was taken, "
                f"and nothing was saved. A lower learning rate or float32 usually helps"
            )
        return norm

    def _finite(self, losses: Tensor, rows: list[str]) -> None:
        good = losses.detach().isfinite().tolist()
        if not all(good):
            bad = [row for row, fine in zip(rows, good, strict=True) if not fine]
            raise TrainingError(
                f"{self._at()}: the loss is not finite for {_some(bad)} ({len(bad)} of the {len(rows)} rows in this "
                f"forward pass). Nothing was saved. Where all rows are hit, lower the learning rate or use float32; "
                f"where few are, look at them"
            )

    def _at(self) -> str:
        return f"step {self.state.global_step + 1}"

    def _count(self, batch: dict[str, Any]) -> None:
        labels = batch["labels"]
        self.counts.examples += len(labels)
        self.counts.computed += labels.numel()
        mask = batch.get("attention_mask")
        self.counts.tokens += labels.numel() if mask is None else int(mask.sum())
        self.counts.supervised += int(supervised(labels).sum())

    def totals(self) -> Counts:
        """The counts over all ranks. Every rank must ask."""
        mine = self.counts
        if self.accelerator.num_processes == 1:
            return mine
        numbers = torch.tensor([mine.examples, mine.tokens, mine.computed, mine.supervised], device=self.args.device)
        return Counts(*self.accelerator.reduce(numbers, "sum").tolist(), seconds=mine.seconds)

    def _clock(self) -> None:
        """Bring the seconds of training up to now."""
        now = time.perf_counter()
        self.counts.seconds += now - self._mark - self._paused
        self._mark, self._paused = now, 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._clock()
            tokens = (self.counts.tokens - self._logged.tokens) * self.accelerator.num_processes
            logs["tokens_per_second"] = round(tokens / max(self.counts.seconds - self._logged.seconds, 1e-9), 1)
            self._logged = replace(self.counts)
        super().log(logs, start_time)

    # ---- evaluation

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Where logits are asked for, as by `predict`, batches are padded."""
        collator = self.data_collator
        if isinstance(collator, Together) and (description == "test" or (description == "Evaluation" and self.compute_metrics)):
            self.data_collator = Collator(layouts.pad_id(self), rows=False)
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collator

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._paused += time.perf_counter() - start

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The mean loss over all supervised tokens, so the batch size does not matter; no logits are kept."""
        if not self.decoder or self.compute_metrics is not None or description != "Evaluation":
            return super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        total = torch.zeros(3, dtype=torch.float64)  # loss, supervised tokens, examples
        for inputs in dataloader:
            losses, tokens, rows = self._evaluated(model, inputs)
            self._finite(losses, rows or [f"evaluation row {i + 1}" for i in range(len(losses))])
            per_row = torch.stack([losses, tokens.to(losses), torch.ones_like(losses)], dim=1)
            total += self.accelerator.gather_for_metrics(per_row).cpu().double().sum(0)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, tokens, examples = total.tolist()
        metrics = {f"{prefix}_loss": loss / max(tokens, 1), f"{prefix}_supervised_tokens": int(tokens)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(examples))  # type: ignore[arg-type]

    @torch.no_grad()
    def _evaluated(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, list[str]]:
        """For each row of a batch: its summed loss, its supervised tokens, where it comes from."""
        if EXAMPLES not in inputs:
            batch = self._prepare_inputs({k: v for k, v in inputs.items() if k != ROWS})
            return row_losses(model, batch, sparse=self._sparse), supervised(batch["labels"]), inputs.get(ROWS, [])
        assert self.packing is not None
        examples: list[Example] = inputs[EXAMPLES]
        packing, losses = self.packing, torch.zeros(len(examples), device=self.args.device)

        def work() -> None:
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                for pack in packing.packs(examples):
                    losses[list(pack.members)] = packing.engine.forward(model, pack).rows.to(losses)

        packing.attempt(work, lambda: None, again=self.accelerator.num_processes == 1)
        tokens = torch.tensor([_supervised([e]) for e in examples], device=losses.device)
        return losses, tokens, [f"{e.source}:{e.line}" for e in examples]

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone (a whole model where there is none) and the tokenizer."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        model: Any = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, **({} if state_dict is None else {"state_dict": state_dict}))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but written under another name and renamed when it is whole."""
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        partial = run_dir / f".{final.name}.partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(partial), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        self._clock()
        totals = self.totals()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.save_tensors(self.accelerator.unwrap_model(self.model), partial)
            checkpoint.write_record(partial, self._signature(), totals)
            self._save_state(partial, final)
            checkpoint.put_in_place(partial, final)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )
        self.accelerator.wait_for_everyone()

    def _save_state(self, partial: Path, final: Path) -> None:
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        states: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()
        self.state.save_to_json(os.fspath(partial / checkpoint.STATE))

    def _signature(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        run = {name: str(getattr(self.args, name)) for name in SAME}
        run["steps"] = str(self.state.max_steps)
        run["batch_size"] = str(self.get_total_train_batch_size(self.args))
        self._rows_hash = self._rows_hash or checkpoint.fingerprint(_items(self.train_dataset))
        return run | {"rows": self._rows_hash}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_tensors(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is not None:
            counts = checkpoint.read_record(Path(checkpoint_dir), self._signature())
            self.counts = counts if self.is_world_process_zero() else Counts()
            self._logged = replace(self.counts)
        super()._load_optimizer_and_scheduler(checkpoint_dir)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        checkpoint.load_tensors(self.accelerator.unwrap_model(self.model), Path(best))


class _AfterStep(TrainerCallback):
    """Methods that change after a step (budgets, projections) are told its number, counted from 1, while its gradients
    are there. A step that a float16 scaler skipped has none that are finite."""

    def __init__(self, live: Callable[[], list[Group]]) -> None:
        self.live = live

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any
    ) -> None:
        if not getattr(now["optimizer"], "step_was_skipped", False):
            for group in self.live():
                group.step(state.global_step + 1)


def _items(dataset: Any) -> Iterator[Any]:
    """The items of a dataset that can be indexed; a stream is not read ahead."""
    if isinstance(dataset, Sized):
        indexed: Any = dataset
        yield from (indexed[i] for i in range(len(dataset)))


def _supervised(examples: list[Example]) -> int:
    """How many tokens carry loss. Nothing predicts the first token of an example."""
    return sum(sum(e.supervised[1:]) for e in examples)


def _some(rows: list[str]) -> str:
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")

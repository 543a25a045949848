"""`trimtab.Trainer`: transformers' Trainer with a loss that does not depend on the split, checkpoints that hold the
adapter alone and resume exactly, evaluation that keeps no logits, and runs that stop when something is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sized
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from trimtab.core.group import Group, groups
from trimtab.data import Example
from trimtab.engine.forward import adds_to_its_loss
from trimtab.errors import TrainingError
from trimtab.model import PeftModel
from trimtab.train import checkpoint, layouts, low_rank, same, saving
from trimtab.train.audits import StepAudit, answering, labels_of, some_labels, trainable
from trimtab.train.batches import EXAMPLES, ROWS, Collator, Together
from trimtab.train.checkpoint import Counts
from trimtab.train.device import emulated
from trimtab.train.finite import IN_A_ROW, Skipped, broken, some
from trimtab.train.objectives.sft import predicts_next, row_losses, supervised, takes_positions
from trimtab.train.options import TrainOptions
from trimtab.train.packing import Packing, remembered
from trimtab.train.stalls import Watch
from trimtab.train.state import random_state, set_random_state


class Trainer(transformers.Trainer):
    """The loss of an optimizer step is the sum over its supervised tokens / their number, over all micro-batches and
    ranks. Takes what `transformers.Trainer` takes; what is above holds for decoder models, others train as there.

    Rows of a decoder model that are `Example`s, or hold `input_ids` and `labels`, need no data_collator: they are laid out
    in packs, by `packing` where it is given, or padded where the engine does not take the model. One line says which.
    Batches of a data_collator of the caller's go through the model as they are. `optim` is loraplus, lorafa or riemannian, with
    `optim_options`; for others it is in the arguments.
    """

    model: Any
    accelerator: Any
    optimizer: Any

    def __init__(
        self, *args: Any, packing: Packing | None = None, stop_after_nonfinite: int = IN_A_ROW, optim: str | None = None,
        optim_options: Any = None, stall_seconds: float = TrainOptions.stall_seconds, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        base: Any = self.base()
        another = self.compute_loss_func is not None or self.label_smoother is not None
        own = any(g.adapter is not None and g.adapter.own_loss for g in groups(base).values())
        self.decoder = not (another or own) and predicts_next(base) and not adds_to_its_loss(base)
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
            self.add_callback(StepAudit(lambda: self.skipped.now))
        self.add_callback(_Steps(self))
        self.watch = Watch(Path(str(self.args.output_dir)), self.args.process_index, stall_seconds)
        self.add_callback(self.watch)
        self.optim_said = {} if optim is None else {"optim": f"{optim} {low_rank.chosen(optim, optim_options)}"}
        if optim is not None:
            self.optimizer = low_rank.optimizer(optim, self.base(), self.args, optim_options)
        self.counts = Counts()
        self.skipped, self._limit = Skipped(stop_after_nonfinite), stop_after_nonfinite
        self._trained: dict[str, Any] = {}
        self.taken = 0  # steps of this very call of `train`
        self._logged = Counts()
        self._mark, self._paused = time.perf_counter(), 0.0

    def base(self) -> nn.Module:
        """The torch model underneath: not wrapped for ranks, adapters in place."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    # ---- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        trainable(self.model)
        answering(self.base())
        if (slow := emulated(self.base())) and self.is_world_process_zero():
            print(f"compute: {slow}")
        if self.decoder:
            some_labels(_items(self.train_dataset))
        self.counts, self._logged, self.skipped = Counts(), Counts(), Skipped(self._limit)
        self.taken = 0
        self._trained = same.adapters(self.live())  # as they start: methods write what they find out into their config
        self._mark, self._paused = time.perf_counter(), 0.0
        with self.watch:
            result = super().train(*args, **kwargs)
        self._clock()
        return result

    def _run_epoch(self, *args: Any, **now: Any) -> None:
        """A resumed run goes on with the sum of the loss it was to log next; one that was at its end takes no step more."""
        if now["resume_from_checkpoint"] is not None and now["epoch"] == now["epochs_trained"]:
            saving.load_progress(self, Path(now["resume_from_checkpoint"]))
            if self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
                return
        super()._run_epoch(*args, **now)

    def _maybe_log_save_evaluate(self, *args: Any, **now: Any) -> None:
        """At the end of an epoch or of the run an evaluation follows: the checkpoint waits for it, and so holds it."""
        last = float(self.state.epoch or 0).is_integer() or self.control.should_training_stop
        waits = self.control.should_save and last and self.args.eval_strategy == "epoch" and not self.control.should_evaluate
        if waits:
            self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **now)
        self.control.should_save |= waits

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if EXAMPLES not in inputs:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if not self.decoder:
                self.skipped.look(loss[None], ["the batch"])
            return loss
        assert self.packing is not None
        model.train()
        examples: list[Example] = inputs[EXAMPLES]
        self.skipped.rows += [f"{e.source}:{e.line}" for e in examples]
        if num_items_in_batch is None:
            num_items_in_batch = _supervised(examples)
        if num_items_in_batch == 0:
            raise TrainingError(f"{self._at()}: no supervised token in the rows {some(self.skipped.rows)}")
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
                    self.skipped.look(result.rows, [f"{examples[m].source}:{examples[m].line}" for m in pack.members])
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
        labels = labels_of(batch, inputs.get(ROWS, []))
        rows = inputs.get(ROWS) or [f"row {i + 1} of the batch" for i in range(len(labels))]
        self.skipped.rows += rows
        if num_items_in_batch is None:
            num_items_in_batch = supervised(labels).sum()
        if num_items_in_batch == 0:
            raise TrainingError(f"{self._at()}: no supervised token in the rows {some(self.skipped.rows)}")
        losses = row_losses(model, batch, sparse=self._sparse)
        self.skipped.look(losses, rows) if model.training else self._finite(losses, rows)
        self._count(batch)
        loss = losses.sum() / num_items_in_batch * self._ranks()
        return loss + self._penalty() if model.training else loss

    def _ranks(self) -> int:
        return self.accelerator.num_processes // self.get_tp_size()  # the mean that DDP takes is to be a sum

    def _penalty(self) -> Tensor | float:
        """What the methods add to the loss: once a step, however it is split."""
        found = [p for group in self.live() if (p := group.penalty()) is not None]
        return sum(found) / self.current_gradient_accumulation_steps if found else 0.0

    def live(self) -> list[Group]:
        """The adapters that take part."""
        return [group for group in groups(self.base()).values() if group.live]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.skipped.judge(self, model, super()._get_grad_norm(model, grad_norm))

    def _finite(self, losses: Tensor, rows: list[str]) -> None:
        if bad := broken(losses, rows):
            raise TrainingError(f"{self._at()}: the loss of an evaluation is not finite for {some(bad)}")

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
        """Draws no random number that training would miss."""
        start, random = time.perf_counter(), random_state(self.args.device)
        try:
            with self.watch.during("an evaluation"):
                return super().evaluate(*args, **kwargs)
        finally:
            set_random_state(random, self.args.device)
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
            counts = supervised(labels_of(batch, inputs.get(ROWS, [])))
            return row_losses(model, batch, sparse=self._sparse), counts, inputs.get(ROWS, [])
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
        with self.watch.during("a save"):
            saving.save(self, trial)

    def signature(self, *, steps: bool = True) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        return saving.signature(self, self._trained, steps=steps)

    @cached_property
    def rows_hashed(self) -> dict[str, Any]:
        return saving.rows_hashed(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saving.load_weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saving.load_state(self, Path(checkpoint))
            if saving.sharded(self):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saving.load_random(self, Path(checkpoint))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        checkpoint.load_tensors(self.accelerator.unwrap_model(self.model), Path(best))


class _Steps(TrainerCallback):
    """What is done around each step. Methods that change after one (budgets, projections) are told its number, counted
    from 1, while its gradients are there. A step that is not taken, or that a float16 scaler skipped, has none to show."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.skipped.begin(self.trainer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **now: Any
    ) -> None:
        if not self.trainer.skipped.now and not getattr(now["optimizer"], "step_was_skipped", False):
            for group in self.trainer.live():
                group.step(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.taken += 1
        if self.trainer.skipped.now:
            self.trainer.log({"skipped_rows": self.trainer.skipped.named})  # type: ignore[dict-item]


def _items(dataset: Any) -> Iterator[Any]:
    """The items of a dataset that can be indexed; a stream is not read ahead."""
    if isinstance(dataset, Sized):
        indexed: Any = dataset
        yield from (indexed[i] for i in range(len(dataset)))


def _supervised(examples: list[Example]) -> int:
    """How many tokens carry loss. Nothing predicts the first token of an example."""
    return sum(sum(e.supervised[1:]) for e in examples)


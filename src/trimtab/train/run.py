"""`trimtab train`: from options to an adapter folder that explains itself."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments, set_seed

from trimtab import mergeable
from trimtab.bases.held import held
from trimtab.core.config import config_for, method_of
from trimtab.core.group import groups
from trimtab.data import Prepared, Renderer, prepare
from trimtab.data.ends import check_ends
from trimtab.engine.compile import choose
from trimtab.engine.forward import engine_for
from trimtab.engine.memory import keep_freed
from trimtab.engine.rope import alone
from trimtab.model import PeftModel, checkpoint_activations
from trimtab.train import batches, checkpoint, layouts, load, low_rank, picture, samples, talks
from trimtab.train.audits import trainable
from trimtab.train.batches import Together
from trimtab.train.callbacks import MetricsFile, ProgressBar, clock, read_metrics
from trimtab.train.check import adapter_options, check
from trimtab.train.device import Hardware, busy, pick
from trimtab.train.folder import METRICS, PICTURE, RUN, SAMPLES, RunFolder
from trimtab.train.options import TrainOptions
from trimtab.train.packing import Packing
from trimtab.train.rate import learning_rate
from trimtab.train.record import Record
from trimtab.train.samples import Sample
from trimtab.train.trainer import Trainer
from trimtab.train.verify import verify


@dataclass
class RunResult:
    """What a run leaves: the folder, `run.json` as a record, the answers before and after, and the tuned model."""

    output_dir: Path
    record: Record
    samples: list[Sample]
    model: Any
    renderer: Renderer
    data: Prepared


def run(options: TrainOptions, *, console: Console | None = None) -> RunResult:
    """Check, read, load, train, evaluate, write. What can be known before step 1 is an error before it."""
    console = (console or Console()) if batches.rank() == 0 else Console(quiet=True)
    check(options)
    if options.verify_resume:
        verify(options, _Teller(console).line)
    return job(options, console).run()


def job(options: TrainOptions, console: Console) -> Job:
    """Everything read, loaded and told: a run that has only to be started."""
    hardware = pick(options.dtype)
    if hardware.device.type == "cpu":
        keep_freed()
    say = _Teller(console)
    say.line("compute", hardware.why)
    if slow := busy():
        say.line("", slow)
    folder = load.model_folder(options.model)
    tokenizer = load.load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    renderer, data = _data(options, tokenizer, say)
    set_seed(options.seed)  # before the adapter is created: its start is part of the run
    model = _model(options, folder, hardware, data, tokenizer.pad_token_id)
    _tell_model(model, options, say)
    return Job(options, console, say, hardware, renderer, data, model)


class _Teller:
    """The plan, one aligned line after another."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, name: str, text: str) -> None:
        self.console.print(Text.assemble((f"{name:<10}", "bold"), text), soft_wrap=True)


def _data(o: TrainOptions, tokenizer: Any, say: _Teller) -> tuple[Renderer, Prepared]:
    renderer = Renderer(tokenizer, chat_template=o.chat_template)
    data = prepare(
        o.dataset,
        renderer,
        val_sources=o.val_dataset,
        val_size=o.val_size,
        max_length=o.max_length,
        train_on=o.train_on,
        overlong=o.overlong,
        max_train_samples=o.max_train_samples,
        seed=o.seed,
    )
    for i, line in enumerate(data.formats):
        say.line("" if i else "rows", line)
    for line in data.ledger.lines():
        say.line("", line)
    own = "the tokenizer's own template" if renderer.chat_template is None else o.chat_template or "a layout of ours"
    ends = f"answers end with {renderer.end_of_turn}" if renderer.end_of_turn else "the text ends with eos"
    open_rows = check_ends(data.train, renderer, max_length=o.max_length, overlong=o.overlong, allowed=o.allow_unended)
    turns = {"assistant": "every assistant turn", "last": "the last assistant turn", "all": "every token"}[o.train_on]
    say.line("loss on", f"{turns}; {own}, {ends}")
    if open_rows:
        say.line("", open_rows)
    if renderer.chat_template is not None:
        tokenizer.chat_template = renderer.chat_template  # so that the adapter folder renders as training did
    talks.try_saving(renderer)
    return renderer, data


def _model(o: TrainOptions, folder: Path, hardware: Hardware, data: Prepared, pad: int) -> PeftModel:
    base = load.load_model(
        folder,
        dtype=hardware.dtype,
        device=hardware.device,
        load_in_4bit=o.load_in_4bit,
        trust_remote_code=o.trust_remote_code,
        held=True,
    )
    # what the adapter's config will call its base: the folder from wherever it is opened, or the hub's name
    given = Path(o.model).expanduser()
    base.name_or_path = base.config._name_or_path = str(given.resolve()) if given.exists() else o.model
    if o.gradient_checkpointing:
        checkpoint_activations(base)
    if o.init_adapter is not None:
        start = str(Path(o.init_adapter).expanduser())
        return PeftModel.from_pretrained(base, start, is_trainable=True, allow_pickle=o.allow_pickle)
    return low_rank.adapted(base, config_for(o.adapter, **adapter_options(o)), folder, data, pad)


def _tell_model(model: Any, o: TrainOptions, say: _Teller) -> None:
    trainable(model)
    trained, every = model.get_nb_trainable_parameters()
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    source = f"from {o.init_adapter}" if o.init_adapter else "new"
    share = f"{100 * trained / every:.2f} %"
    name = method_of(model.peft_config["default"]).name
    say.line("adapter", f"{name}, {source}: trains {trained:,} of {every:,} parameters ({share}) in {', '.join(dtypes)}")
    if kept := held(model):
        say.line("", f"linear layers of the base hold their weights in {kept} and multiply in float32: half the memory")
    for why in filter(None, map(mergeable.never, groups(model.get_base_model()).values())):
        say.line("merge", why)


class Job:
    """One run, from a loaded model to the written folder."""

    def __init__(
        self,
        options: TrainOptions,
        console: Console,
        say: _Teller,
        hardware: Hardware,
        renderer: Renderer,
        data: Prepared,
        model: Any,
    ) -> None:
        self.options, self.console, self.say = options, console, say
        self.renderer, self.data, self.model = renderer, data, model
        self.folder = RunFolder(Path(options.output_dir).expanduser())
        self.path = self.folder.path
        self.bar = ProgressBar(console)
        self.samples = samples.choose(options.sample_prompts, data, renderer)
        self.packing = self._packing()
        self.rate = options.learning_rate or learning_rate(model.config)
        self.trainer = self._trainer(hardware)
        self.main = self.trainer.is_world_process_zero()
        self.record = Record(
            status="running",
            model=model.get_base_model().name_or_path,
            adapter=method_of(model.peft_config["default"]).name,
            seed=options.seed,
            dtype=str(hardware.dtype).removeprefix("torch."),
            device=hardware.device.type,
            trainable_parameters=model.get_nb_trainable_parameters()[0],
            data=data.ledger.as_dict(),
            template=talks.record(renderer, data.train),
            options=asdict(options) | {"learning_rate": self.rate},
        )

    # ---- the trainer

    def _packing(self) -> Packing | None:
        """How steps are laid out; None, with a line that says why, where the model takes padded batches."""
        o = self.options
        why = layouts.launched() if o.packing else "padded batches, as asked"
        engine, why = (None, why) if why else engine_for(self.model)
        together = batches.micro_size(o.batch_size, o.micro_batch_size) if engine is None else 1
        alone(self.model.config, [len(e.input_ids) for e in (*self.data.train, *self.data.val)], together)
        if engine is None:
            self.say.line("layout", why)
            return None
        made = Packing(engine, o.pack_tokens, rows=o.micro_batch_size, say=lambda text: self.say.line("", text))
        tokens = sum(len(e.input_ids) for e in self.data.train) * self.steps() * o.batch_size / len(self.data.train)
        engine.compiled, why = choose("off" if o.gradient_checkpointing else o.compile, engine.model, tokens)
        self.say.line("layout", made.line)
        self.say.line("compile", why)
        return made

    def _trainer(self, hardware: Hardware) -> Trainer:
        o = self.options
        callbacks: list[Any] = [MetricsFile(self.path / METRICS), self.bar]
        if o.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(o.early_stopping_patience))
        trainer = Trainer(
            model=self.model,
            args=self._arguments(hardware),
            train_dataset=self.data.train,
            eval_dataset=self.data.val or None,
            data_collator=Together() if self.packing else batches.Collator(self.renderer.tokenizer.pad_token_id),
            processing_class=self.renderer.tokenizer,
            callbacks=callbacks,
            packing=self.packing,
            optim=o.optim if o.optim in low_rank.OPTIONS else None,
            optim_options=asdict(o),
            stop_after_nonfinite=o.stop_after_nonfinite,
            stall_seconds=o.stall_seconds,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, hardware: Hardware) -> TrainingArguments:
        o, held_out = self.options, bool(self.data.val)
        share = o.batch_size // batches.ranks()
        micro = share if self.packing else batches.micro_size(o.batch_size, o.micro_batch_size)
        accumulate = share // micro
        steps = self.steps()
        warmup = 0 if o.lr_scheduler_type == "constant" else int(o.warmup_ratio * steps)  # it takes none
        split = "" if self.packing else f" ({micro} at a time)"
        length = f"{len(self.data.train):,} rows, {o.batch_size} a step{split}: {steps:,} steps"
        self.say.line("steps", f"{length}, {warmup} of warm-up, {o.lr_scheduler_type} from {self.rate:g}")
        method, usual = method_of(self.model.peft_config["default"]).name, TrainOptions.adapter
        if o.learning_rate is None and method != usual:
            self.say.line("", f"the learning rate is the default of {usual}; {method} may need another: --learning_rate")
        best = o.load_best_model_at_end and not o.save_steps
        return TrainingArguments(
            output_dir=str(self.path),
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=o.num_train_epochs,
            max_steps=o.max_steps,
            learning_rate=self.rate,
            lr_scheduler_type=o.lr_scheduler_type,
            warmup_steps=warmup,
            weight_decay=o.weight_decay,
            max_grad_norm=o.max_grad_norm,
            optim=TrainOptions.optim if o.optim in low_rank.OPTIONS else o.optim,
            seed=o.seed,
            train_sampling_strategy="random" if o.shuffle else "sequential",
            logging_steps=o.logging_steps,
            logging_first_step=True,
            eval_strategy="no" if not held_out else "steps" if o.eval_steps else "epoch",
            eval_steps=o.eval_steps,
            eval_on_start=held_out and o.resume_from_checkpoint is None,
            save_strategy="best" if best else "steps" if o.save_steps else "no",
            save_steps=o.save_steps or 500,
            save_total_limit=o.save_total_limit,
            load_best_model_at_end=o.load_best_model_at_end,
            metric_for_best_model="loss" if held_out else None,
            greater_is_better=False if held_out else None,
            report_to=o.report_to or "none",
            use_cpu=hardware.device.type == "cpu",
            fp16=hardware.dtype is torch.float16 and hardware.device.type == "cuda",
            dataloader_pin_memory=hardware.device.type == "cuda",
            remove_unused_columns=False,
            disable_tqdm=True,
        )

    def steps(self) -> int:
        o = self.options
        epoch = math.ceil(len(self.data.train) / o.batch_size)
        return o.max_steps if o.max_steps > 0 else math.ceil(epoch * o.num_train_epochs)

    # ---- the run

    def run(self) -> RunResult:
        resume = self.options.resume_from_checkpoint
        start = checkpoint.to_resume(resume, self.path) if resume else None
        if self.main:
            if moved := self.folder.open(resume=start is not None):
                self.say.line("output", moved)
        try:
            if self.main:
                self._answer("before")
                self._write("running")
            try:
                self.trainer.train(resume_from_checkpoint=str(start) if start else None)
            finally:
                self.bar.close()
            self._finish()
        except BaseException as error:
            self._stopped(error)
            raise
        return RunResult(self.path, self.record, self.samples, self.model, self.renderer, self.data)

    def _answer(self, when: str) -> None:
        """Greedy answers to the fixed prompts; before training, of what the run starts from."""
        fresh = when == "before" and self.options.init_adapter is None
        if fresh:
            with self.model.disable_adapter():
                found = samples.answers(self.model, self.samples, self.renderer)
        else:
            found = samples.answers(self.model, self.samples, self.renderer)
        for sample, text in zip(self.samples, found, strict=True):
            setattr(sample, when, text)

    def _write(self, status: str) -> None:
        self.record.status = status
        self.folder.write(RUN, self.record.text())

    def _stopped(self, error: BaseException) -> None:
        if not self.main:
            return
        if not self.trainer.taken:
            self.folder.undo()
            return
        with suppress(OSError):  # a full disk may be what stopped it; that is the error to show
            self._write_stopped(error)

    def _write_stopped(self, error: BaseException) -> None:
        self.record.error = str(error) or type(error).__name__
        self.record.skipped_steps = self.trainer.skipped.counts.steps
        self.record.count(self.trainer.counts, self.trainer.state.global_step, read_metrics(self.path / METRICS))
        self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    def _finish(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        if self.data.val:
            measured = [line for line in state.log_history if "eval_loss" in line]
            self.record.eval_loss_before = measured[0]["eval_loss"] if measured[0]["step"] == 0 else None
            fresh = measured[-1]["step"] == state.global_step and not state.best_model_checkpoint
            self.record.eval_loss = (measured[-1] if fresh else trainer.evaluate())["eval_loss"]
        totals = trainer.totals()
        if not self.main:
            return
        self._answer("after")
        metrics = read_metrics(self.path / METRICS)
        self.record.count(totals, state.global_step, metrics)
        self.record.skipped_steps = trainer.skipped.counts.steps
        title = f"{self.record.adapter} on {Path(self.record.model).name}: {totals.examples:,} examples"
        picture.draw(metrics, self.path / PICTURE, title)
        samples.write(self.samples, self.path / SAMPLES)
        self.folder.finish(self.model, self.renderer)
        self._write("completed")
        self._tell_result()

    def _tell_result(self) -> None:
        r = self.record
        if self.samples:
            samples.show(self.samples, self.console)
        self.say.line("trained", f"{r.steps:,} steps, {r.tokens_seen:,} tokens in {clock(r.train_seconds)}, "
                      f"{r.tokens_per_second:,.0f} tokens/s, {r.peak_memory_bytes / 2**30:.1f} GB at most")  # fmt: skip
        if r.first_loss is not None and r.final_loss is not None:
            self.say.line("loss", f"{r.first_loss:.4f} at the first step, {r.final_loss:.4f} at the last")
        if r.eval_loss is not None:
            before = "" if r.eval_loss_before is None else f"{r.eval_loss_before:.4f} before, "
            self.say.line("held out", f"{before}{r.eval_loss:.4f} after")
        self.say.line("written", f"{self.path}: the adapter, its tokenizer, {RUN}, {METRICS}, {PICTURE}, {SAMPLES}")

"""Every option of a training run, with the field's standard names. Flags, YAML keys and `run.json` are generated from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trimtab.core.config import option


@dataclass(kw_only=True)
class TrainOptions:
    """Options of `trimtab train`. An adapter's own fields (`r`, `lora_alpha`, ...) are in `adapter_options`.

    `batch_size` counts examples per optimizer step; how they are split into forward passes never changes the result.
    """

    # what
    dataset: list[str] = option(list, "files or folders of rows: .jsonl .json .csv .parquet", group="Data")
    model: str = option("", "a model folder (or hub id, if it is in the local cache)", group="Model")
    output_dir: str = option("out", "where the adapter folder is written", group="Run")
    # data
    val_dataset: list[str] = option(list, "files or folders of validation rows", group="Data")
    val_size: float = option(0.0, "rows held out: a share below 1, or a number", group="Data")
    max_length: int = option(2048, "longest example in tokens", group="Data")
    overlong: Literal["drop", "truncate_prompt", "truncate_end", "error"] = option(
        "drop", "what happens to longer ones", group="Data"
    )
    allow_unended: bool = option(False, "train though over 1 % of the rows teach no end of an answer", group="Data")
    train_on: Literal["assistant", "last", "all"] = option("assistant", "turns that carry loss", group="Data")
    chat_template: str | None = option(
        None, "chatml, chatglm or a .jinja file (default: the tokenizer's own)", group="Data"
    )
    max_train_samples: int | None = option(None, "use only the first N rows", group="Data")
    shuffle: bool = option(True, "false: file order in every epoch", group="Data")
    # model
    adapter: str = option("lora", "method: see `trimtab methods`", group="Model")
    init_adapter: str | None = option(None, "start from the weights of this adapter folder", group="Model")
    load_in_4bit: bool = option(False, "quantise the frozen base to 4-bit NF4 (needs bitsandbytes)", group="Model")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "of the base; auto: bfloat16 where the chip has it", group="Model"
    )
    trust_remote_code: bool = option(False, "run code that the model folder brings", group="Model")
    allow_pickle: bool = option(False, "read a pickled init_adapter (adapter_model.bin), if you trust it", group="Model")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower", group="Model")
    # optimisation
    batch_size: int = option(16, "examples per optimizer step", group="Optimisation")
    micro_batch_size: int | None = option(None, "examples per forward pass (default: chosen)", group="Optimisation")
    packing: bool = option(True, "lay examples end to end, share what they begin with; false: pad", group="Optimisation")
    pack_tokens: int | None = option(None, "tokens per forward pass (default: chosen by memory)", group="Optimisation")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile decoder layers; auto: where the run is long enough to win it back", group="Optimisation"
    )
    num_train_epochs: float = option(1.0, "passes over the rows", group="Optimisation")
    max_steps: int = option(-1, "optimizer steps; overrides epochs", group="Optimisation")
    learning_rate: float | None = option(
        None, "peak learning rate (default: 2e-4 x 4096 / the model's width, at most 2e-3)", group="Optimisation"
    )
    lr_scheduler_type: str = option(
        "cosine", "schedule after warm-up (linear, cosine, constant, ...)", group="Optimisation"
    )
    warmup_ratio: float = option(0.03, "share of the steps that warm up", group="Optimisation")
    weight_decay: float = option(0.0, "decoupled weight decay", group="Optimisation")
    max_grad_norm: float = option(1.0, "clip the gradient's norm; 0: never", group="Optimisation")
    optim: str = option(
        "adamw_torch_fused", "optimizer: loraplus, lorafa, riemannian, or a name of transformers", group="Optimisation"
    )
    loraplus_lr_ratio: float | None = option(None, "loraplus: how much faster B learns (default: 16)", group="Optimisation")
    loraplus_lr_embedding: float | None = option(
        None, "loraplus: learning rate of adapters on embeddings (default: 1e-6)", group="Optimisation"
    )
    riemannian_reg: float | None = option(None, "riemannian: damping (default: 0.01)", group="Optimisation")
    seed: int = option(42, "of everything random", group="Run")
    # run
    logging_steps: int = option(1, "steps between lines of metrics.jsonl", group="Run")
    eval_steps: int | None = option(None, "steps between evaluations (default: once an epoch)", group="Run")
    save_steps: int | None = option(None, "steps between checkpoints (default: at the end only)", group="Run")
    save_total_limit: int | None = option(2, "checkpoints kept", group="Run")
    early_stopping_patience: int | None = option(
        None, "stop after this many evaluations without a better loss", group="Run"
    )
    stop_after_nonfinite: int = option(
        3, "steps in a row whose loss or gradient is not finite that end the run; 1: the first", group="Run"
    )
    stall_seconds: float = option(
        900.0, "stand still for so long: one line, and where all threads are into the folder; 0: never", group="Run"
    )
    load_best_model_at_end: bool = option(False, "keep the adapter with the lowest validation loss", group="Run")
    report_to: list[str] = option(list, "loggers of transformers: tensorboard, wandb, ...", group="Run")
    resume_from_checkpoint: str | None = option(None, "continue from a checkpoint folder, or `last`", group="Run")
    verify_resume: bool = option(
        False, "first show on a few steps of this run that resuming it gives the same bytes", group="Run"
    )
    sample_prompts: list[str] = option(list, "prompts answered before and after (default: a few rows)", group="Run")
    # the adapter's own fields, by their published names
    adapter_options: dict[str, Any] = option(dict, "r, lora_alpha, target_modules, ...", group="Adapter")

"""Every option of a training run, with the field's standard names. Flags, YAML keys and `run.json` are generated from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _opt(default: Any, help: str, **more: Any) -> Any:
    """A field with the one line that `--help` and the docs show."""
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata={"help": help, **more})


@dataclass(kw_only=True)
class TrainOptions:
    """Options of `trimtab train`. An adapter's own fields (`r`, `lora_alpha`, ...) are in `adapter_options`.

    `batch_size` counts examples per optimizer step; how they are split into forward passes never changes the result.
    """

    # what
    dataset: list[str] = _opt(list, "files or folders of rows: .jsonl .json .csv .parquet", group="Data")
    model: str = _opt("", "a model folder (or hub id, if it is in the local cache)", group="Model")
    output_dir: str = _opt("out", "where the adapter folder is written", group="Run")
    # data
    val_dataset: list[str] = _opt(list, "files or folders of validation rows", group="Data")
    val_size: float = _opt(0.0, "rows held out: a share below 1, or a number", group="Data")
    max_length: int = _opt(2048, "longest example in tokens", group="Data")
    overlong: Literal["drop", "truncate_prompt", "truncate_end", "error"] = _opt(
        "drop", "what happens to longer ones", group="Data"
    )
    train_on: Literal["assistant", "last", "all"] = _opt("assistant", "turns that carry loss", group="Data")
    max_train_samples: int | None = _opt(None, "use only the first N rows", group="Data")
    shuffle: bool = _opt(True, "false: file order in every epoch", group="Data")
    # model
    adapter: str = _opt("lora", "method: see `trimtab methods`", group="Model")
    init_adapter: str | None = _opt(None, "start from the weights of this adapter folder", group="Model")
    load_in_4bit: bool = _opt(False, "quantise the frozen base to 4-bit NF4 (needs bitsandbytes)", group="Model")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _opt(
        "auto", "of the base; auto: bfloat16 where the chip has it", group="Model"
    )
    trust_remote_code: bool = _opt(False, "run code that the model folder brings", group="Model")
    gradient_checkpointing: bool = _opt(False, "recompute activations: less memory, slower", group="Model")
    # optimisation
    batch_size: int = _opt(16, "examples per optimizer step", group="Optimisation")
    micro_batch_size: int | None = _opt(None, "examples per forward pass (default: chosen)", group="Optimisation")
    num_train_epochs: float = _opt(1.0, "passes over the rows", group="Optimisation")
    max_steps: int = _opt(-1, "optimizer steps; overrides epochs", group="Optimisation")
    learning_rate: float = _opt(2e-4, "peak learning rate", group="Optimisation")
    lr_scheduler_type: str = _opt(
        "cosine", "schedule after warm-up (linear, cosine, constant, ...)", group="Optimisation"
    )
    warmup_ratio: float = _opt(0.03, "share of the steps that warm up", group="Optimisation")
    weight_decay: float = _opt(0.0, "decoupled weight decay", group="Optimisation")
    max_grad_norm: float = _opt(1.0, "clip the gradient's norm; 0: never", group="Optimisation")
    optim: str = _opt("adamw_torch", "optimizer, a name of transformers", group="Optimisation")
    seed: int = _opt(42, "of everything random", group="Run")
    # run
    logging_steps: int = _opt(1, "steps between lines of metrics.jsonl", group="Run")
    eval_steps: int | None = _opt(None, "steps between evaluations (default: once an epoch)", group="Run")
    save_steps: int | None = _opt(None, "steps between checkpoints (default: at the end only)", group="Run")
    save_total_limit: int | None = _opt(2, "checkpoints kept", group="Run")
    early_stopping_patience: int | None = _opt(
        None, "stop after this many evaluations without a better loss", group="Run"
    )
    load_best_model_at_end: bool = _opt(False, "keep the adapter with the lowest validation loss", group="Run")
    report_to: list[str] = _opt(list, "loggers of transformers: tensorboard, wandb, ...", group="Run")
    resume_from_checkpoint: str | None = _opt(None, "continue from a checkpoint folder, or `last`", group="Run")
    sample_prompts: list[str] = _opt(list, "prompts answered before and after (default: a few rows)", group="Run")
    # the adapter's own fields, by their published names
    adapter_options: dict[str, Any] = _opt(dict, "r, lora_alpha, target_modules, ...", group="Adapter")

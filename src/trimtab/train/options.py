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
    dataset: list[str] = option(list, "files or folders of rows, the same as DATA: .jsonl .json .csv .parquet", group="Data")
    model: str = option("", "a model folder (or a hub id that is in the local cache)", group="Model")
    output_dir: str = option("out", "where the adapter folder is written", group="Run")
    # data
    val_dataset: list[str] = option(list, "files or folders of rows to validate on", group="Data")
    val_size: float = option(0.0, "rows held out for validation: a share below 1, or a number of rows", group="Data")
    max_length: int = option(2048, "longest example in tokens", group="Data")
    overlong: Literal["drop", "truncate_prompt", "truncate_end", "error"] = option(
        "drop", "what to do with longer examples", group="Data"
    )
    allow_unended: bool = option(
        False, "train even if over 1 % of the rows have no end-of-answer token in the loss", group="Data"
    )
    train_on: Literal["assistant", "last", "all"] = option(
        "assistant", "the turns to learn; last: the assistant's last", group="Data"
    )
    chat_template: str | None = option(
        None, "how turns become text: chatml, chatglm or a .jinja file (default: the tokenizer's own)", group="Data"
    )
    max_train_samples: int | None = option(None, "use only the first N rows", group="Data")
    shuffle: bool = option(True, "mix the rows anew in every epoch; false: file order", group="Data")
    # model
    adapter: str = option("lora", "the method; all of them: trimtab methods", group="Model")
    init_adapter: str | None = option(None, "start from the weights of this adapter folder", group="Model")
    load_in_4bit: bool = option(False, "hold the frozen base in 4-bit NF4: less memory (needs bitsandbytes)", group="Model")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "number format of the base; auto: bfloat16 where the chip has it", group="Model"
    )
    trust_remote_code: bool = option(False, "run the Python code that comes with the model folder", group="Model")
    allow_pickle: bool = option(False, "read an init_adapter saved as adapter_model.bin; it can run code", group="Model")
    gradient_checkpointing: bool = option(
        False, "compute activations twice instead of keeping them: less memory, slower", group="Model"
    )
    # optimisation
    batch_size: int = option(16, "examples per optimizer step", group="Optimisation")
    micro_batch_size: int | None = option(
        None, "examples per forward pass (default: by pack_tokens; without packing up to 8)", group="Optimisation"
    )
    packing: bool = option(
        True, "lay examples end to end; a beginning in common is computed once; false: pad", group="Optimisation"
    )
    pack_tokens: int | None = option(
        None, "tokens per forward pass (default: by free memory on CUDA, 1,536 on a CPU)", group="Optimisation"
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile decoder layers: faster steps, slower start; auto: where the run is long enough", group="Optimisation"
    )
    num_train_epochs: float = option(1.0, "passes over the rows", group="Optimisation")
    max_steps: int = option(-1, "optimizer steps, instead of epochs; -1: by epochs", group="Optimisation")
    learning_rate: float | None = option(
        None, "peak learning rate (default: 2e-4 x 4096 / the model's width, at most 2e-3)", group="Optimisation"
    )
    lr_scheduler_type: str = option(
        "cosine", "how the learning rate goes on after warm-up: cosine, linear, constant, ...", group="Optimisation"
    )
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises to its peak", group="Optimisation")
    weight_decay: float = option(0.0, "pull of the weights to zero (decoupled weight decay)", group="Optimisation")
    max_grad_norm: float = option(1.0, "a gradient with a larger norm is scaled down to it; 0: never", group="Optimisation")
    optim: str = option(
        "adamw_torch_fused", "optimizer: loraplus, lorafa, riemannian, or any that transformers names", group="Optimisation"
    )
    loraplus_lr_ratio: float | None = option(
        None, "loraplus: learning rate of B over that of A (default: 16)", group="Optimisation"
    )
    loraplus_lr_embedding: float | None = option(
        None, "loraplus: learning rate of adapters on embeddings (default: 1e-6)", group="Optimisation"
    )
    riemannian_reg: float | None = option(
        None, "riemannian: added before a matrix is inverted (default: 0.01)", group="Optimisation"
    )
    seed: int = option(42, "seed of everything random", group="Run")
    # run
    logging_steps: int = option(1, "steps between lines of metrics.jsonl", group="Run")
    eval_steps: int | None = option(None, "steps between validations (default: once an epoch)", group="Run")
    save_steps: int | None = option(
        None, "steps between checkpoints (default: no checkpoints, the adapter at the end)", group="Run"
    )
    save_total_limit: int | None = option(2, "checkpoints kept; older ones are deleted", group="Run")
    early_stopping_patience: int | None = option(
        None, "stop after this many validations without a better loss", group="Run"
    )
    stop_after_nonfinite: int = option(
        3, "end the run after this many steps in a row with a loss or gradient of inf or nan", group="Run"
    )
    stall_seconds: float = option(
        900.0,
        "after so many seconds without progress, print a warning and write all thread stacks to output_dir; 0: never",
        group="Run",
    )
    load_best_model_at_end: bool = option(False, "keep the adapter with the lowest validation loss", group="Run")
    report_to: list[str] = option(list, "log to these as well: tensorboard, wandb, ... (as in transformers)", group="Run")
    resume_from_checkpoint: str | None = option(
        None, "continue from this checkpoint folder, or from the `last` in output_dir", group="Run"
    )
    verify_resume: bool = option(
        False, "before training, prove on a few steps that a resumed run gives the same bytes", group="Run"
    )
    sample_prompts: list[str] = option(
        list, "a prompt to answer before and after; repeat for more (default: a few rows)", group="Run"
    )
    # the adapter's own fields, by their published names
    adapter_options: dict[str, Any] = option(dict, "r, lora_alpha, target_modules, ...", group="Adapter")

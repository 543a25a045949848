"""What other tools call our options. One table; each translation is printed, and what cannot be meant here is refused.

Spellings of LLaMA-Factory, Axolotl, TRL, ms-swift, Unsloth, litgpt, mlx-lm and torchtune.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.cli.values import FALSE, TRUE, convert
from trimtab.cli.yamlfile import Given

Options = dict[str, Any]


class Refused(ValueError):
    """A known option of another tool that this one does not have."""


def _names(**table: str) -> dict[str, str]:
    return {theirs: ours for ours, words in table.items() for theirs in words.split()}


RENAMED = _names(
    packing="sample_packing",
    model="base_model model_name_or_path model_id model_name pretrained_model_name_or_path checkpoint_dir",
    dataset="datasets data data_path dataset_path dataset_name train_file train_data train_dataset",
    val_dataset="eval_dataset eval_data eval_file valid_data validation_file validation_data val_data test_datasets",
    val_size="val_set_size test_split_size split_dataset_ratio val_split_fraction",
    output_dir="output out_dir save_dir save_path adapter_path",
    max_length="cutoff_len sequence_len max_seq_length max_seq_len model_max_length max_input_length",
    max_train_samples="max_samples num_train_samples",
    chat_template="chat_template_path chat_template_jinja",
    num_train_epochs="epochs num_epochs",
    max_steps="iters max_iters max_train_steps num_steps",
    batch_size="global_batch_size effective_batch_size total_batch_size",
    learning_rate="lr",
    lr_scheduler_type="lr_scheduler scheduler scheduler_type",
    optim="optimizer optimizer_type",
    max_grad_norm="grad_clip gradient_clipping clip_grad_norm",
    gradient_checkpointing="grad_checkpoint activation_checkpointing",
    dtype="torch_dtype compute_dtype",
    adapter="finetuning_type fine_tune_type tuner_type peft_type peft_method",
    init_adapter="adapter_name_or_path lora_model_dir lora_weights",
    resume_from_checkpoint="resume resume_from auto_resume_from_checkpoints",
    save_total_limit="save_limit",
    save_steps="save_interval steps_per_save",
    eval_steps="eval_interval steps_per_eval",
    logging_steps="log_interval log_every steps_per_report",
    early_stopping_patience="patience",
    report_to="logger_name",
    r="lora_r lora_rank rank",
    lora_alpha="alpha",
    lora_dropout="dropout",
    target_modules="lora_target lora_target_modules lora_modules",
    modules_to_save="lora_modules_to_save additional_target",
    layers_to_transform="peft_layers_to_transform",
    use_dora="peft_use_dora",
    use_rslora="peft_use_rslora",
)


def _yes(value: Any) -> bool:
    return convert(value, bool)


def _mask(everything: bool) -> Callable[[Any], Options]:
    """`train_on_inputs`-like switches; `everything`: the value that puts loss on the prompt too."""
    return lambda v: {"train_on": "all" if _yes(v) is everything else "assistant"}


def _precision(name: str) -> Callable[[Any], Options]:
    return lambda v: {"dtype": "auto"} if str(v).lower() == "auto" else {"dtype": name} if _yes(v) else {}


def _bits(value: Any) -> Options:
    if str(value).lower() in ("none", "null", "16"):
        return {}
    if str(value) != "4":
        raise Refused(f"{value}-bit bases are not supported; 4-bit is: load_in_4bit")
    return {"load_in_4bit": True}


def _no_8bit(value: Any) -> Options:
    if _yes(value):
        raise Refused("8-bit bases are not supported; use load_in_4bit, or neither")
    return {}


def _quantize(value: Any) -> Options:
    word = str(value).lower()
    if word.startswith(("bnb.nf4", "nf4", "4bit", "4-bit")):
        return {"load_in_4bit": True}
    raise Refused(f"quantisation {value!r} is not supported; 4-bit NF4 is: load_in_4bit")


def _only(*accepted: str, instead: str) -> Callable[[Any], Options]:
    """Switches whose listed values ask for what happens anyway; another value is refused."""

    def check(value: Any) -> Options:
        if str(value).lower() not in accepted:
            raise Refused(f"{value!r} is not supported; {instead}")
        return {}

    return check


def _anything(_: Any) -> Options:
    return {}


# theirs -> a function of its value that returns ours; {} means: nothing to change, and the line says so
REWRITTEN: dict[str, Callable[[Any], Options]] = {
    "train_on_inputs": _mask(True),
    "train_on_prompt": _mask(True),
    "mask_prompt": _mask(False),
    "assistant_only_loss": _mask(False),
    "completion_only_loss": _mask(False),
    "train_on_completions": _mask(False),
    "bf16": _precision("bfloat16"),
    "fp16": _precision("float16"),
    "fp32": _precision("float32"),
    "load_in_8bit": _no_8bit,
    "quantization_bit": _bits,
    "quant_bits": _bits,
    "quantize": _quantize,
    "template": lambda v: {"chat_template": v} if v in ("chatml", "chatglm") else {},  # others: as the tokenizer has it
    "lora_target_linear": lambda v: {"target_modules": "all-linear"} if _yes(v) else {},
    "disable_gradient_checkpointing": lambda v: {"gradient_checkpointing": not _yes(v)},
    "stage": _only("sft", instead="only supervised fine-tuning is here yet"),
    "rl": _only("none", "false", instead="only supervised fine-tuning is here yet"),
    "do_train": _only(*TRUE, instead="`trimtab train` trains"),
    "train": _only(*TRUE, instead="`trimtab train` trains"),
    "use_peft": _only(*TRUE, instead="trimtab trains adapters only"),
    "eval_strategy": _only("steps", "epoch", "no", "false", instead="say eval_steps"),
    "evaluation_strategy": _only("steps", "epoch", "no", "false", instead="say eval_steps"),
    "save_strategy": _only("steps", "no", "false", instead="say save_steps"),
    "group_by_length": _anything,
    "per_device_eval_batch_size": _anything,
    "eval_batch_size": _anything,
    "overwrite_cache": _anything,
    "overwrite_output_dir": _anything,  # an earlier run is kept aside
    "save_only_model": _only("false", "no", instead="checkpoints are complete"),
    "pad_to_sequence_len": _anything,
    "flash_attention": _anything,
    "ddp_timeout": _anything,
    "preprocessing_num_workers": _anything,
    "dataloader_num_workers": _anything,
    "plot_loss": _only(*TRUE, instead="the loss picture is always drawn"),
}

# read together, below: their product is the batch
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "grad_accumulation_steps")

KNOWN = {*RENAMED, *REWRITTEN, *BATCH, "warmup_steps"}
# flags that may stand alone, as `--bf16`
SWITCHES = set(
    "train_on_inputs train_on_prompt mask_prompt assistant_only_loss completion_only_loss train_on_completions"
    " bf16 fp16 fp32 load_in_8bit lora_target_linear disable_gradient_checkpointing do_train train use_peft"
    " sample_packing group_by_length overwrite_cache overwrite_output_dir flash_attention plot_loss".split()
)


def translate(given: Given) -> dict[str, Any]:
    """One option under our names; the same option if it already has one. Raises ValueError for what cannot be meant."""
    if given.key in REWRITTEN:
        return REWRITTEN[given.key](given.value)
    key = RENAMED.get(given.key, given.key)
    return _adjusted(key, given.value)


def _adjusted(key: str, value: Any) -> Options:
    """Values that other tools give to a shared name."""
    word = str(value).lower()
    if key == "adapter" and word == "qlora":
        return {"adapter": "lora", "load_in_4bit": True}
    if key == "adapter":
        return {"adapter": word}
    if key == "target_modules" and word in ("all", "all_linear", "all-linear"):
        return {"target_modules": "all-linear"}
    if key in ("dataset", "val_dataset") and isinstance(value, list):
        return {key: [_path_of(v) for v in value]}
    if key == "chat_template" and word in ("tokenizer_default", "default", "none"):
        return {}
    if key == "report_to" and word in ("none", "[none]", "['none']"):
        return {"report_to": []}
    if key == "resume_from_checkpoint" and word in {*TRUE, *FALSE, "auto", "latest"}:
        return {"resume_from_checkpoint": None if word in FALSE else "last"}
    if key == "lr_scheduler_type":
        return {"lr_scheduler_type": word}
    return {key: value}


def _path_of(item: Any) -> Any:
    """Axolotl's `datasets: [{path: rows.jsonl, type: alpaca}]`; the type is detected here."""
    return item["path"] if isinstance(item, dict) and set(item) <= {"path", "type"} and "path" in item else item

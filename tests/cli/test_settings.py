"""Flags and YAML to options: what is understood, how it is typed, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.cli.settings import Settings, resolve
from trimtab.errors import ConfigError
from trimtab.train.options import TrainOptions


def yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def asked(settings: Settings) -> dict[str, Any]:
    """The options that differ from the defaults."""
    default = TrainOptions()
    return {k: v for k, v in vars(settings.options).items() if v != getattr(default, k)}


def problem(args: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["a.jsonl", "b,c.jsonl"], {"dataset": ["a.jsonl", "b,c.jsonl"]}),
        (["--dataset", "a.jsonl,b.jsonl"], {"dataset": ["a.jsonl", "b.jsonl"]}),
        (["--max_length", "512"], {"max_length": 512}),
        (["--max-length=512"], {"max_length": 512}),
        (["--learning_rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate", "-1e-4"], {"learning_rate": -1e-4}),
        (["--max_steps", "1e3"], {"max_steps": 1000}),
        (["--load_in_4bit", "rows.jsonl"], {"load_in_4bit": True, "dataset": ["rows.jsonl"]}),
        (["--load-in-4bit", "false"], {}),
        (["--no-shuffle"], {"shuffle": False}),
        (["--shuffle=false"], {"shuffle": False}),
        (["--report_to", "wandb", "--report_to", "tensorboard"], {"report_to": ["wandb", "tensorboard"]}),
        (["--sample_prompts", "Hello, you"], {"sample_prompts": ["Hello, you"]}),
        (["--eval_steps", "none"], {}),
        (["--target_modules", "q_proj"], {"adapter_options": {"target_modules": ["q_proj"]}}),
        (["--target_modules", "q_proj,v_proj"], {"adapter_options": {"target_modules": ["q_proj", "v_proj"]}}),
        (["--target_modules", r".*\.q_proj"], {"adapter_options": {"target_modules": r".*\.q_proj"}}),
        (["--target_modules", "all-linear"], {"adapter_options": {"target_modules": "all-linear"}}),
        (["--rank_pattern", "{q_proj: 4}"], {"adapter_options": {"rank_pattern": {"q_proj": 4}}}),
        (["--layers_to_transform", "0,1"], {"adapter_options": {"layers_to_transform": [0, 1]}}),
        (["--r", "4", "--lora_alpha", "32"], {"adapter_options": {"r": 4, "lora_alpha": 32}}),
        (["--init_lora_weights", "gaussian"], {"adapter_options": {"init_lora_weights": "gaussian"}}),
        (["--init_lora_weights", "false"], {"adapter_options": {"init_lora_weights": False}}),
        (["--use_dora", "rows.jsonl"], {"adapter_options": {"use_dora": True}, "dataset": ["rows.jsonl"]}),
        (
            ["--adapter", "prefix_tuning", "--num_virtual_tokens", "8"],
            {"adapter": "prefix_tuning", "adapter_options": {"num_virtual_tokens": 8}},
        ),
    ],
)
def test_flags(args: list[str], expected: dict[str, Any]) -> None:
    settings = resolve(args)
    assert asked(settings) == expected
    assert settings.notes == []


def test_yaml_has_the_same_names(tmp_path: Path) -> None:
    text = "model: m\nlearning-rate: 1e-4\ndataset: [a.jsonl, b.jsonl]\nshuffle: off\nr: 4\ntarget_modules: [q_proj]\n"
    settings = resolve(["--config", yaml(tmp_path, text)])
    assert asked(settings) == {
        "model": "m",
        "learning_rate": 1e-4,
        "dataset": ["a.jsonl", "b.jsonl"],
        "shuffle": False,
        "adapter_options": {"r": 4, "target_modules": ["q_proj"]},
    }
    assert settings.given["learning_rate"].endswith("run.yaml:2")


def test_flags_win_over_yaml(tmp_path: Path) -> None:
    config = yaml(tmp_path, "lora_r: 4\nmax_length: 100\ndataset: a.jsonl\n")
    settings = resolve(["b.jsonl", "--config", config, "--r", "16"])
    assert asked(settings) == {"dataset": ["b.jsonl"], "max_length": 100, "adapter_options": {"r": 16}}


@pytest.mark.parametrize(
    ("args", "expected", "note"),
    [
        (["--cutoff_len", "512"], {"max_length": 512}, "cutoff_len -> max_length 512"),
        (["--base_model", "m"], {"model": "m"}, "base_model -> model m"),
        (["--lora-rank", "4"], {"adapter_options": {"r": 4}}, "lora_rank -> r 4"),
        (["--lr", "1e-3"], {"learning_rate": 1e-3}, "lr -> learning_rate 1e-3"),
        (["--epochs", "3"], {"num_train_epochs": 3.0}, "epochs -> num_train_epochs 3"),
        (["--val_set_size", "0.1"], {"val_size": 0.1}, "val_set_size -> val_size 0.1"),
        (["--train_on_inputs", "false"], {}, "train_on_inputs false -> train_on assistant"),
        (["--train_on_inputs"], {"train_on": "all"}, "train_on_inputs True -> train_on all"),
        (["--mask_prompt", "false"], {"train_on": "all"}, "mask_prompt false -> train_on all"),
        (["--bf16"], {"dtype": "bfloat16"}, "bf16 True -> dtype bfloat16"),
        (["--bf16", "auto"], {}, "bf16 auto -> dtype auto"),
        (["--fp16", "false"], {}, "fp16 false -> nothing to change here"),
        (["--adapter", "qlora"], {"load_in_4bit": True}, "adapter qlora -> adapter lora, load_in_4bit True"),
        (["--quantization_bit", "4"], {"load_in_4bit": True}, "quantization_bit 4 -> load_in_4bit True"),
        (["--load_in_8bit", "false"], {}, "load_in_8bit false -> nothing to change here"),
        (
            ["--lora_target", "all"],
            {"adapter_options": {"target_modules": "all-linear"}},
            "lora_target all -> target_modules all-linear",
        ),
        (
            ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"],
            {"batch_size": 8, "micro_batch_size": 2},
            "per_device_train_batch_size 2 x gradient_accumulation_steps 4 -> batch_size 8, micro_batch_size 2",
        ),
        (
            ["--micro_batch_size", "2", "--gradient_accumulation_steps", "3"],
            {"batch_size": 6, "micro_batch_size": 2},
            "micro_batch_size 2 x gradient_accumulation_steps 3 -> batch_size 6, micro_batch_size 2",
        ),
        (
            ["--batch_size", "32", "--gradient_accumulation_steps", "4"],
            {"batch_size": 32, "micro_batch_size": 8},
            "batch_size 32 x gradient_accumulation_steps 4 -> batch_size 32, micro_batch_size 8",
        ),
        (
            ["--per_device_train_batch_size", "4"],
            {"batch_size": 4, "micro_batch_size": 4},
            "per_device_train_batch_size 4 -> batch_size 4, micro_batch_size 4",
        ),
        (
            ["--warmup_steps", "10", "--max_steps", "100"],
            {"max_steps": 100, "warmup_ratio": 0.1},
            "warmup_steps 10 -> warmup_ratio 0.1",
        ),
        (["--report_to", "none"], {}, "report_to none -> report_to "),
        (["--template", "chatml"], {"chat_template": "chatml"}, "template chatml -> chat_template chatml"),
        (["--template", "llama3"], {}, "template llama3 -> nothing to change here"),
        (["--chat_template=tokenizer_default"], {}, "chat_template tokenizer_default -> nothing to change here"),
        (["--resume", "auto"], {"resume_from_checkpoint": "last"}, "resume auto -> resume_from_checkpoint last"),
    ],
)
def test_other_tools_spellings_are_understood_and_said(args: list[str], expected: dict[str, Any], note: str) -> None:
    settings = resolve(args)
    assert asked(settings) == expected
    assert settings.notes == [note]


def test_a_step_is_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the tools that these names come from: torchrun on 4 cards with 2 x 4 takes 32 examples a step."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    both = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    settings = resolve(both)
    assert asked(settings) == {"batch_size": 32, "micro_batch_size": 2}
    assert settings.notes == [
        "per_device_train_batch_size 2 x gradient_accumulation_steps 4 on 4 processes -> batch_size 32, micro_batch_size 2"
    ]
    assert asked(resolve(["--per_device_train_batch_size", "2"])) == {"batch_size": 8, "micro_batch_size": 2}
    split = ["--batch_size", "32", "--gradient_accumulation_steps", "2"]
    assert asked(resolve(split)) == {"batch_size": 32, "micro_batch_size": 4}
    with pytest.raises(ConfigError, match=r"batch_size 8 is not per_device_train_batch_size 2 x .* 4 on 4 processes"):
        resolve([*both, "--batch_size", "8"])


def test_micro_batch_size_alone_is_ours() -> None:
    settings = resolve(["--micro_batch_size", "2"])
    assert (asked(settings), settings.notes) == ({"micro_batch_size": 2}, [])


def test_a_flag_overrules_a_product_in_the_file(tmp_path: Path) -> None:
    config = yaml(tmp_path, "micro_batch_size: 2\ngradient_accumulation_steps: 4\n")
    assert asked(resolve(["--config", config, "--batch_size", "32"])) == {"batch_size": 32, "micro_batch_size": 2}


def test_an_axolotl_file(tmp_path: Path) -> None:
    text = """\
base_model: llama
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_target_linear: true
datasets:
  - path: data.jsonl
    type: alpaca
sequence_len: 1024
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
bf16: auto
"""
    settings = resolve(["--config", yaml(tmp_path, text)])
    assert asked(settings) == {
        "model": "llama",
        "load_in_4bit": True,
        "dataset": ["data.jsonl"],
        "max_length": 1024,
        "batch_size": 8,
        "micro_batch_size": 2,
        "num_train_epochs": 3.0,
        "optim": "adamw_torch",
        "adapter_options": {"r": 32, "target_modules": "all-linear"},
    }


def test_a_llama_factory_file(tmp_path: Path) -> None:
    text = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: rows.jsonl
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
    assert asked(resolve(["--config", yaml(tmp_path, text)])) == {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "trust_remote_code": True,
        "dataset": ["rows.jsonl"],
        "max_train_samples": 1000,
        "output_dir": "saves/llama3-8b/lora/sft",
        "logging_steps": 10,
        "save_steps": 500,
        "batch_size": 8,
        "micro_batch_size": 1,
        "learning_rate": 1e-4,
        "num_train_epochs": 3.0,
        "warmup_ratio": 0.1,
        "dtype": "bfloat16",
        "adapter_options": {"r": 8, "target_modules": "all-linear"},
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate: unknown option 'lerning_rate'. Did you mean 'learning_rate'?"),
        (["--lora_rnk", "1"], "--lora_rnk: unknown option 'lora_rnk'. Did you mean 'lora_rank'?"),
        (["--zzz"], "--zzz: unknown option 'zzz'. All of them: trimtab train --help"),
        (["--learning_rate", "fast"], "--learning_rate: learning_rate: expected a number, got 'fast'"),
        (["--max_steps", "1.5"], "--max_steps: max_steps: expected a whole number, got '1.5'"),
        (
            ["--overlong", "dorp"],
            "--overlong: overlong: expected one of drop, truncate_prompt, truncate_end, error; got 'dorp'."
            " Did you mean 'drop'?",
        ),
        (["--shuffle=maybe"], "--shuffle: shuffle: expected true or false, got 'maybe'"),
        (["--model"], "--model: needs a value, as in --model VALUE"),
        (["-m"], "-m: unknown; options begin with two dashes, as in --model FOLDER"),
        (["--lora_alpha", "x"], "--lora_alpha: lora_alpha: expected a number, got 'x'"),
        (["--init_lora_weights"], "--init_lora_weights: needs a value, as in --init_lora_weights VALUE"),
        (["--seed", "1", "--seed", "2"], "--seed: given twice ('1', then '2'); keep one"),
        (
            ["--r", "4", "--lora_r", "8"],
            "--lora_r: lora_r says r = '8', but --r says '4'; keep one",
        ),
        (
            ["--load_in_8bit"],
            "--load_in_8bit: load_in_8bit: 8-bit bases are not supported; use load_in_4bit, or neither",
        ),
        (
            ["--warmup_steps", "10"],
            "--warmup_steps: warmup_steps: warm-up is a share of the steps here; say warmup_ratio (0.03), or max_steps"
            " as well",
        ),
        (
            ["--batch_size", "9", "--micro_batch_size", "2", "--gradient_accumulation_steps", "4"],
            "--batch_size: batch_size 9 is not micro_batch_size 2 x gradient_accumulation_steps 4; leave one out",
        ),
        (["--stage", "dpo"], "--stage: stage: 'dpo' is not supported; only supervised fine-tuning is here yet"),
        (
            ["--adapter", "lorra"],
            "--adapter: no method is called 'lorra'. Did you mean 'lora'? All of them: trimtab methods",
        ),
    ],
)
def test_a_problem_names_the_place_and_the_fix(args: list[str], message: str) -> None:
    assert problem(args) == message


def test_a_field_of_another_adapter() -> None:
    said = problem(["--adapter", "prompt_tuning", "--lora_alpha", "4"])
    assert said.startswith("--lora_alpha: lora_alpha is not an option of the adapter 'prompt_tuning'. Its own: ")
    assert "num_virtual_tokens" in said


def test_a_method_s_own_name_is_no_other_tool_s_spelling() -> None:
    """`dropout` is lora_dropout to those that have one, and itself to those that call theirs so; `alpha` likewise."""
    kept, renamed = (resolve(["--adapter", name, "--dropout", "0.2"]) for name in ("loreft", "lora"))
    assert kept.options.adapter_options == {"dropout": 0.2} and kept.notes == []
    assert renamed.options.adapter_options == {"lora_dropout": 0.2} and "dropout -> lora_dropout" in renamed.notes[0]
    assert resolve(["--adapter", "gralora", "--alpha", "8"]).options.adapter_options == {"alpha": 8}


def test_all_problems_at_once(tmp_path: Path) -> None:
    config = yaml(tmp_path, "lerning_rate: 1\nmax_length: long\nr: 4\nr: 8\n")
    assert problem(["--config", config, "--seed", "x"]).replace(config, "run.yaml") == (
        "4 problems:\n"
        "  run.yaml:4: r is given twice (first on line 3); keep one\n"
        "  run.yaml:1: unknown option 'lerning_rate'. Did you mean 'learning_rate'?\n"
        "  run.yaml:2: max_length: expected a whole number, got 'long'\n"
        "  --seed: seed: expected a whole number, got 'x'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 4\nmodel: m\nr: 8\n", "run.yaml:3: r is given twice (first on line 1); keep one"),
        ("max-length: 4\nmax_length: 8\n", "run.yaml:2: max_length is given twice (first on line 1); keep one"),
        ("model: [a\n", "run.yaml:2: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("- model\n", "run.yaml:1: expected `option: value` lines, found a list"),
        ("just text\n", "run.yaml:1: expected `option: value` lines, found a single value"),
        ("model: {a: b}\n", "run.yaml:1: model: expected text, got {'a': 'b'}"),
        ("[" * 5000, "run.yaml: nested too deeply; options are flat `option: value` lines"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    config = yaml(tmp_path, text)
    assert problem(["--config", config]).replace(config, "run.yaml") == message


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in problem(["--config", str(tmp_path / "none.yaml")])
    assert "is a folder" in problem(["--config", str(tmp_path)])


def test_yaml_elsewhere_is_untouched() -> None:
    import yaml as pyyaml

    assert pyyaml.safe_load("1e-4") == "1e-4"

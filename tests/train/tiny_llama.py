"""A Llama of 30 thousand parameters, rows for it, and the plain loop that everything is compared with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

VOCABULARY = 61
PAD = 0


@dataclass
class Example:
    input_ids: list[int]
    supervised: list[bool]
    source: str = "rows.jsonl"
    line: int = 1

    @property
    def labels(self) -> list[int]:
        return [t if s else -100 for t, s in zip(self.input_ids, self.supervised, strict=True)]


def llama(seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def rows(n: int, seed: int = 0) -> list[Example]:
    """Ragged rows: 4 to 30 tokens, of which the last 1 to half are supervised, now and then with a hole."""
    draw = random.Random(seed)
    found = []
    for line in range(1, n + 1):
        length = draw.randint(4, 30)
        answer = draw.randint(1, length // 2)
        mask = [False] * (length - answer) + [True] * answer
        if answer > 3:
            mask[-2] = False
        ids = [draw.randint(3, VOCABULARY - 1) for _ in range(length)]
        found.append(Example(ids, mask, "rows.jsonl", line))
    return found


def collate(examples: list[Example]) -> dict[str, Any]:
    longest = max(len(e.input_ids) for e in examples)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(e.input_ids, PAD) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * len(e.input_ids), 0) for e in examples]),
        "labels": torch.tensor([padded(e.labels, -100) for e in examples]),
        "rows": [f"{e.source}:{e.line}" for e in examples],
    }


def one_by_one(model: Any, examples: list[Example]) -> Tensor:
    """The definition of a step's loss: every row alone, no padding, sum over supervised tokens / their number."""
    total, count = torch.zeros(()), 0
    for e in examples:
        logits = model(input_ids=torch.tensor([e.input_ids])).logits[0, -len(e.input_ids) :]  # behind virtual tokens
        for t in range(1, len(e.input_ids)):
            if e.supervised[t]:
                total = total - logits[t - 1].log_softmax(-1)[e.input_ids[t]]
                count += 1
    return total / count


def arguments(folder: Path, **over: Any) -> TrainingArguments:
    given: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
        max_steps=5,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    return TrainingArguments(**given | over)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapted(*, checkpointing: bool = False, seed: int = 0, **options: Any) -> Any:
    """The Llama with LoRA on every linear layer."""
    from trimtab.core.config import config_for
    from trimtab.model import get_peft_model

    model = llama(seed)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    return get_peft_model(model, config_for("lora", task_type="CAUSAL_LM", **given))


def base(model: Any) -> Any:
    return model.get_base_model()


def embedding(model: Any) -> Any:
    return base(model).get_input_embeddings()


def tensors(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

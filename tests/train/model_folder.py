"""A model folder as users have one: a tiny Llama, a byte-level tokenizer with a chat template; and rows for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tiny_llama as tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "blue", "green")


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|im_start|>", "<|im_end|>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


def write_model(folder: Path) -> Path:
    tok = tokenizer()
    tiny.llama(vocabulary=len(tok)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def write_rows(path: Path) -> Path:
    draw = random.Random(0)
    lines = [{"input": f"row {i}", "output": draw.choice(COLOURS) * draw.randint(1, 2)} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path

"""A byte-level tokenizer of a few hundred tokens, chat templates of every temper, and rows."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.data import Conversation, Example

SPECIAL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|end|>", "<|return|>", "<|start|>", "<turn>",
    "</turn>", "[INST]", "[/INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
]

CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

SYSTEM_DEFAULT = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}
""" + CHATML

TRIMS_WITH_BOS = """\
{{- bos_token }}
{%- for m in messages %}{{- '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{% endif %}"""

STRICT = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}
{{- '<turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content | trim + '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\n' }}{% endif %}"""

INST = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{% elif m.role == 'user' %}
{{- '[INST] ' }}
{%- if messages[0].role == 'system' and loop.last %}{{- messages[0].content + '\n\n' }}{% endif %}
{{- m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

THOUGHTS = """\
{%- set last = namespace(query=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought, said = '', m.content %}
{%- if '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.query %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- said + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

TOOLS = """\
{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' and (loop.first or not messages[loop.index0 - 1].tool_calls) %}
{{ raise_exception('a tool answered without being called') }}{% endif %}
{{- '<|im_start|>' + m.role }}
{%- if m.content %}{{- '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

TWO_ENDS = """\
{%- for m in messages %}
{{- '<|start|>' + m.role + ('<|system|>final' if m.role == 'assistant' else '') + '<|user|>' + m.content }}
{{- '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""

UNCLOSED = """\
{%- for m in messages %}{{- ('User: ' if m.role == 'user' else 'Assistant: ') + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- 'Assistant: ' }}{% endif %}"""

GENERATION_TAG = """\
{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}
{%- generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def tokenizer(template: str | None = CHATML, cls: type = PreTrainedTokenizerFast, **tokens: Any) -> Any:
    """Bytes, some merges (among them two newlines, and a space with a letter), the special tokens; pad is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("Ġ", "P"), ("t", "h"), ("h", "e"), (":", "Ġ"), ("Ġ", "Ġ"), ("e", "r")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    chosen = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **tokens}
    made = cls(tokenizer_object=core, **chosen)
    made.chat_template = template
    return made


def talk(*turns: str, system: str = "", **more: Any) -> Conversation:
    """A conversation of alternating user and assistant turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    head = [{"role": "system", "content": system}] if system else []
    return Conversation(head + messages, None, "rows.jsonl", 1, **more)


def learnt(example: Example, tok: Any) -> list[str]:
    """The text of each run of supervised tokens."""
    pairs = zip(example.input_ids, example.supervised, strict=True)
    runs = [[i for i, _ in run] for loss, run in groupby(pairs, key=lambda p: p[1]) if loss]
    return [tok.decode(run, skip_special_tokens=False) for run in runs]


def write(path: Path, *rows: Any) -> Path:
    """JSON Lines; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path

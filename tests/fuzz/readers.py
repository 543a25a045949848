"""What reads files of strangers, each as one function from bytes: it returns, or it raises `TrimtabError`. All else is a bug.

Run by hypothesis in the tests, and for longer by `make fuzz` (by atheris, where that is installed).
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab import PeftConfig, PeftModel, headers, store
from trimtab.cli.settings import resolve
from trimtab.core.group import groups
from trimtab.data import Problems, Renderer, conversations, read
from trimtab.errors import TrimtabError
from trimtab.states import unload

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="trimtab-fuzz-"))


@cache
def _model() -> Any:
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=16, **shape))


@cache
def _tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<end>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def refused(work: Callable[[], Any]) -> str | None:
    """None where it went well, else the message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            work()
        except TrimtabError as error:
            assert str(error).strip(), "an error without a message"
            return str(error)
    return None


def rows(data: bytes, suffix: str) -> str | None:
    """A data file, to conversations."""
    file = _folder() / f"rows{suffix}"
    file.write_bytes(data)

    def work() -> None:
        problems = Problems()
        conversations(read([file], problems), problems)
        problems.raise_any()

    return refused(work)


def options(data: bytes) -> str | None:
    """A YAML file of a run."""
    file = _folder() / "run.yaml"
    file.write_bytes(data)
    return refused(lambda: resolve(["--config", str(file)]))


def adapter_config(data: bytes) -> str | None:
    """`adapter_config.json`, and the adapter that it describes on a small model."""
    place = _folder() / "adapter"
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_bytes(data)
    if not (place / store.WEIGHTS_FILE).is_file():
        from safetensors.torch import save_file

        save_file({"base_model.model.x": torch.zeros(1)}, place / store.WEIGHTS_FILE)

    def work() -> None:
        PeftConfig.from_pretrained(place)
        try:
            PeftModel.from_pretrained(_model(), place, strict=False)
        finally:
            left = groups(_model())
            if left:
                unload(_model())

    said = refused(work)
    assert not any("adapters" in name for name, _ in _model().named_modules()), "left on the model by a load that failed"
    return said


def safetensors(data: bytes) -> str | None:
    """Weights: our look at the header first, then the tensors. What our look lets through must load."""
    place = _folder() / "weights"
    place.mkdir(exist_ok=True)
    (place / store.WEIGHTS_FILE).write_bytes(data)

    def work() -> None:
        claims = headers.header(place / store.WEIGHTS_FILE)
        read_back = store.read(place)
        assert {k: tuple(v.shape) for k, v in read_back.items() if "F4" not in claims[k].dtype} == {
            k: c.shape for k, c in claims.items() if "F4" not in c.dtype
        }

    return refused(work)


def index(data: bytes) -> str | None:
    """`model.safetensors.index.json`: no entry leads out of the folder."""
    place = _folder() / "model"
    place.mkdir(exist_ok=True)
    (place / headers.INDEX).write_bytes(data)
    return refused(lambda: [f.relative_to(place) for f in headers.shards(place)])


def template(data: bytes) -> str | None:
    """A chat template, rendered as training and as chat render it."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = data.decode("utf-8", errors="replace") or None

    def work() -> None:
        renderer = Renderer(tokenizer)
        renderer.text(TALK)
        renderer.prompt_ids(TALK[:1])

    return refused(work)


def framed(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


READERS: dict[str, Callable[[bytes], str | None]] = {
    "jsonl": lambda data: rows(data, ".jsonl"),
    "json": lambda data: rows(data, ".json"),
    "csv": lambda data: rows(data, ".csv"),
    "parquet": lambda data: rows(data, ".parquet"),
    "yaml": options,
    "adapter_config": adapter_config,
    "safetensors": safetensors,
    "index": index,
    "template": template,
}

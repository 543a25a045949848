"""Tiny models, and the two directions in which an adapter can travel between peft and us."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import trimtab
from trimtab.core.config import config_for


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    sizes: dict[str, Any] = dict(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def bert() -> nn.Module:
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return BertForSequenceClassification(BertConfig(vocab_size=37, num_labels=3, max_position_embeddings=64, **sizes))


def t5() -> nn.Module:
    sizes: dict[str, Any] = dict(vocab_size=37, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2))


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = MODELS[name]().eval()
    with torch.no_grad():
        for n, p in made.named_parameters():
            if n.endswith("bias"):  # they start at 0, where mistakes do not show
                p.normal_(std=0.1)
            elif p.dim() > 1:
                p.mul_(2)  # logits of order one
    return made


def inputs(name: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 37, (2, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        found["decoder_input_ids"] = torch.randint(3, 37, (2, 4), generator=draw)
    return found


def logits(model: Any, name: str) -> Tensor:
    """Those of tokens: of what a model says at padding, nothing is defined."""
    batch = inputs(name)
    with torch.no_grad():
        found = model.eval()(**batch).logits
    if name in ("llama", "gpt2"):
        mask = batch["attention_mask"]
        virtual = mask.new_ones(len(mask), found.shape[1] - mask.shape[1])
        found = found * torch.cat([virtual, mask], 1)[..., None]
    return found


def configs(method: str, model: str, **options: Any) -> tuple[Any, Any]:
    """The same config, ours and theirs."""
    fields = {"task_type": TASKS[model]} | options
    ours = config_for(method, **copy.deepcopy(fields))
    if method == "dora":
        fields["use_dora"] = True
    return ours, getattr(peft, type(ours).__name__)(**copy.deepcopy(fields))


def move(model: nn.Module, size: float = 0.1) -> None:
    """Every trained tensor off its start."""
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _, p in sorted(((n, p) for n, p in model.named_parameters()), key=lambda np: np[0]):
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=draw).to(p.dtype))


def quiet_peft(model: nn.Module, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in load_file(folder / "adapter_model.safetensors").items()}


def settings(folder: Path) -> dict[str, Any]:
    """A config file with its sets in one order; peft writes the heads of a prompt twice."""
    values = json.loads((folder / "adapter_config.json").read_text())
    return {
        k: sorted(set(v)) if isinstance(v, list) and all(isinstance(e, str) for e in v) else v
        for k, v in values.items()
    }


def same_settings(ours: Path, theirs: Path) -> None:
    """peft writes `all-linear` out as the names that it found."""
    a, b = settings(ours), settings(theirs)
    if a["target_modules" if "target_modules" in a else "peft_type"] == "all-linear":
        b["target_modules"] = "all-linear"
    assert {k: (a.get(k), b.get(k)) for k in {*a, *b} if a.get(k, ...) != b.get(k, ...)} == {}


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> None:
    assert a.shape == b.shape
    error = (a - b).abs().max().item()
    assert error <= bound, error


def exchange(
    name: str,
    ours: Any,
    theirs: Any,
    folder: Path,
    *,
    bound: float = 1e-5,
    make: Any = base,
    for_peft: Any = None,
    answer: Any = logits,
    extra: str = " ",
) -> Any:
    """Their trained adapter in our hands, and ours in theirs: same keys, same config, same logits. `for_peft`: the model
    that peft gets, where it is made in another way. `extra`: a regex of keys that one of the two writes alone. `bound` is
    relative to the largest answer where that is above 1."""
    for_peft = for_peft or make
    start = answer(for_peft(name), name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        them = quiet_peft(for_peft(name), theirs)
        move(them)
        them.save_pretrained(folder / "theirs")
        want = answer(them, name)
    if want.shape == start.shape:
        assert (want - start).abs().max() > 1e-3  # the adapter does something
    loaded = trimtab.PeftModel.from_pretrained(make(name), folder / "theirs")
    bound *= max(1.0, want.abs().max().item())
    close(answer(loaded, name), want, bound)

    us = trimtab.get_peft_model(make(name), ours)
    move(us)
    us.save_pretrained(folder / "ours")
    mine, those = keys(folder / "ours"), keys(folder / "theirs")
    assert (extra == " ") == (mine == those)
    assert {k: v for k, v in mine.items() if not re.search(extra, k)} == {
        k: v for k, v in those.items() if not re.search(extra, k)
    }
    same_settings(folder / "ours", folder / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(for_peft(name), str(folder / "ours")).eval()
    close(answer(us, name), answer(back, name), bound)
    return loaded

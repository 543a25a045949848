"""Activated LoRA: a LoRA that acts from its invocation on, so that what stands before it is the base model's, cache and all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.call import Call
from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import method
from trimtab.core.group import Group
from trimtab.errors import ConfigError, NotMergeable, NotSupported
from trimtab.methods.lora import LoRA, LoraConfig


@method("LORA", config=LoraConfig, small={"r": 4, "alora_invocation_tokens": [5, 6]}, switch="alora_invocation_tokens")
class ALoRA(Adapter):
    """y_t = W x_t + [t >= t*] s B A x_t                                                                  arXiv:2504.12397

    t* is where the last occurrence of the invocation tokens begins in the row; without one, nothing acts. Where tokens follow
    on a cache they go on as it was, unless several at once hold the invocation. A model that takes no tokens has it act always.
    """

    routed = True

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__()
        site.need("aLoRA", "linear")
        invocation: Any = cfg.alora_invocation_tokens
        if not isinstance(invocation, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in invocation):
            raise ConfigError(f"alora_invocation_tokens={invocation!r}: it is the list of the invocation's token ids")
        if cfg.task_type not in (None, "CAUSAL_LM"):
            raise NotSupported(f"aLoRA waits for tokens of the text that goes on: task_type CAUSAL_LM, not {cfg.task_type}")
        self.lora, self.site, self.call, self.adapter = LoRA(cfg, site), site.name, site.call, site.adapter
        self.names = {"lora.": ""}

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("aLoRA acts on some tokens of a row and not on others: it has no weight to merge, or to read")

    def forward(self, x: Tensor, base: Base) -> Tensor:
        acts = self.call.get(self.adapter)  # (rows, tokens)
        if acts is None:
            return self.lora(x, base)
        if x.shape[:-1] != acts.shape:
            raise NotSupported(f"{self.site!r} gets {tuple(x.shape)}: not one vector for each of {tuple(acts.shape)} tokens")
        lora, on = self.lora, acts[..., None]
        y = base(x) + lora.s * base.op.mix(on * base.op(lora.drop(x), lora.lora_A.weight), lora.lora_B.weight)
        return y if lora.lora_B.bias is None else y + lora.s * on * lora.lora_B.bias

    @classmethod
    def enter(cls, group: Group, call: Call, given: dict[str, Any]) -> Tensor | None:
        ids, cache, mask = given.get("input_ids"), call.cache, given.get("attention_mask")
        if ids is None:
            if not call.tokens:
                return None
            raise ConfigError(f"aLoRA {group.name!r} looks for its invocation in input_ids, and the model got inputs_embeds")
        config: Any = group.config
        old = 0 if cache is None else int(cache.get_seq_length())
        rows, new = ids.shape
        last = ids.new_full((rows,), torch.iinfo(ids.dtype).max)  # where each row's invocation begins, cache included
        if old and (known := getattr(cache, "trimtab_call", {}).get(group.name)) is not None:
            last = known
        real = mask[:, -new:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(ids).bool()
        refuse_packed(given, real, group.name)
        if new > 1 or not old:
            last = torch.where((at := occurrence(ids, real, config.alora_invocation_tokens)) >= 0, old + at, last)
        call.kept[group.name] = last
        return torch.arange(old, old + new, device=ids.device) >= last[:, None]


def refuse_packed(given: dict[str, Any], real: Tensor, name: str) -> None:
    positions = given.get("position_ids")
    again = positions.diff(dim=-1) < 0 if isinstance(positions, Tensor) else torch.zeros(())
    if bool((again & real[:, 1:]).any() if again.dim() == 2 else again.any()) or given.get("layout") is not None:
        raise NotSupported(f"aLoRA {name!r} has one invocation for each row, so rows cannot be packed into one")


def occurrence(ids: Tensor, real: Tensor, tokens: list[int]) -> Tensor:
    """Where the last occurrence of `tokens` begins in each row, padding left out; -1: nowhere."""
    n = len(tokens)
    if ids.shape[1] < n:
        return ids.new_full((len(ids),), -1)
    found = ((ids.unfold(1, n, 1) == torch.tensor(tokens, device=ids.device)) & real.unfold(1, n, 1)).all(-1)
    return torch.where(found, torch.arange(found.shape[1], device=ids.device), -1).amax(1)

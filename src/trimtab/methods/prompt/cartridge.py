"""Cartridges: a key-value cache that is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.config import in_range, method, option
from trimtab.methods.prompt._keys import KeyPrompt, read_heads
from trimtab.methods.prompt._virtual import PromptConfig


@dataclass(kw_only=True)
class CartridgeConfig(PromptConfig):
    num_frozen_tokens: int = option(1, "virtual tokens at the front that are not trained: the sink of attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("num_frozen_tokens", self.num_frozen_tokens, 0, self.num_virtual_tokens)


@method("CARTRIDGE", config=CartridgeConfig, small={"num_virtual_tokens": 3})
class Cartridge(KeyPrompt):
    """K_i' = [P_2i; K_i],  V_i' = [P_2i+1; V_i]  in layer i                               arXiv:2506.06266, section 3.1

    P (n, 2 layers * kv_heads * head_dim); its first rows are frozen. It is meant to start as the cache of a real text:
    `trimtab.initialize_kv_prefix_from_text`.
    """

    frozen: Tensor

    def __init__(self, cfg: CartridgeConfig, model: nn.Module) -> None:
        super().__init__(cfg, cfg.num_virtual_tokens, read_heads(cfg, model))
        table = self.embedding.weight.detach()
        self.register_buffer("frozen", table[: cfg.num_frozen_tokens].clone(), persistent=False)
        self.embedding = nn.Embedding.from_pretrained(table[cfg.num_frozen_tokens :].clone(), freeze=False)

    def table(self) -> Tensor:
        return torch.cat([self.frozen.to(self.embedding.weight.dtype), self.embedding.weight])

    def load(self, tensors: dict[str, Tensor]) -> None:
        saved = self.fitting(tensors["prompt_embeddings"])
        self.frozen.copy_(saved[: len(self.frozen)])
        self.embedding.weight.data.copy_(saved[len(self.frozen) :])

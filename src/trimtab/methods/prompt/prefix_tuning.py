"""Prefix tuning: trained keys and values in front of those of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.core.config import method, one_of, option
from trimtab.methods.prompt._keys import KeyPrompt, read_heads
from trimtab.methods.prompt._virtual import PromptConfig


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptConfig):
    encoder_hidden_size: int | None = option(None, "width of the projection's hidden layer; none: token_dim")
    prefix_projection: bool = option(False, "make the table by a two-layer network while training")
    init_weights: str | None = option(None, "zero: start at zero; none: N(0, 1), as published")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("init_weights", self.init_weights, [None, "zero"])


@method("PREFIX_TUNING", config=PrefixTuningConfig, small={"num_virtual_tokens": 3})
class PrefixTuning(KeyPrompt):
    """K_i' = [P_2i; K_i],  V_i' = [P_2i+1; V_i]  in layer i                                   arXiv:2101.00190, eq. 3

    P (n, 2 layers * kv_heads * head_dim) trained, or made by Linear-Tanh-Linear from (n, token_dim); what is saved is P.
    """

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        width = read_heads(cfg, model)
        cfg.encoder_hidden_size = cfg.encoder_hidden_size or cfg.token_dim
        if cfg.prefix_projection and not cfg.inference_mode:
            last: Any = nn.Linear(cfg.encoder_hidden_size, width)
            hidden = nn.Linear(cfg.token_dim, cfg.encoder_hidden_size)
            super().__init__(cfg, cfg.num_virtual_tokens, cfg.token_dim, nn.Sequential(hidden, nn.Tanh(), last))
        else:
            super().__init__(cfg, cfg.num_virtual_tokens, width)
            last = self.embedding
        if cfg.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

"""Prompt tuning: trained embeddings in front of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import seeded
from trimtab.core.config import method, one_of, option
from trimtab.errors import ConfigError
from trimtab.methods.prompt._embeddings import EmbeddedPrompt, text_rows, vocabulary
from trimtab.methods.prompt._virtual import PromptConfig, read_model


@dataclass(kw_only=True)
class PromptTuningConfig(PromptConfig):
    prompt_tuning_init: str = option("RANDOM", "RANDOM, SAMPLE_VOCAB (rows of the vocabulary) or TEXT")
    prompt_tuning_init_text: str | None = option(None, "for TEXT: the text whose embeddings are the start")
    tokenizer_name_or_path: str | None = option(None, "for TEXT: the tokenizer")
    tokenizer_kwargs: dict[str, Any] | None = option(None, "for TEXT: arguments of the tokenizer")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = one_of(
            "prompt_tuning_init", self.prompt_tuning_init, ["RANDOM", "SAMPLE_VOCAB", "TEXT"]
        )
        if self.prompt_tuning_init == "TEXT" and not (self.prompt_tuning_init_text and self.tokenizer_name_or_path):
            raise ConfigError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text and tokenizer_name_or_path")


@method("PROMPT_TUNING", config=PromptTuningConfig, small={"num_virtual_tokens": 3})
class PromptTuning(EmbeddedPrompt):
    """E' = [P; E(ids)],  P (n, dim) trained                                                   arXiv:2104.08691, section 2"""

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        read_model(cfg, model)
        super().__init__(cfg, cfg.num_virtual_tokens * cfg.num_transformer_submodules, cfg.token_dim)
        if cfg.prompt_tuning_init != "RANDOM" and not cfg.inference_mode:
            words = vocabulary(model)
            if not words.is_meta:
                with torch.no_grad():
                    self.embedding.weight.copy_(self.start(cfg, words))

    def start(self, cfg: PromptTuningConfig, words: Tensor) -> Tensor:
        rows = len(self.embedding.weight)
        if cfg.prompt_tuning_init == "TEXT":
            return text_rows(cfg, words, rows)
        return words[torch.randint(len(words), (rows,), generator=seeded("prompt_embeddings"))]

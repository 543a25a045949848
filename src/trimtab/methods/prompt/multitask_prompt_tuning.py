"""Multitask prompt tuning: one prompt for all tasks, times a low-rank matrix of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import seeded
from trimtab.core.config import in_range, method, one_of, option
from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.methods.prompt._embeddings import EmbeddedPrompt, text_rows, vocabulary
from trimtab.methods.prompt._virtual import PromptConfig, read_model

_SOURCES = ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]
_FACTORS = "prefix_task_cols", "prefix_task_rows"


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptConfig):
    prompt_tuning_init: str = option("RANDOM", f"RANDOM, TEXT, or from a trained one: {', '.join(_SOURCES)}")
    prompt_tuning_init_text: str | None = option(None, "for TEXT: the text whose embeddings are the start")
    tokenizer_name_or_path: str | None = option(None, "for TEXT: the tokenizer")
    tokenizer_kwargs: dict[str, Any] | None = option(None, "for TEXT: arguments of the tokenizer")
    prompt_tuning_init_state_dict_path: str | None = option(None, "safetensors file of the trained one")
    prompt_tuning_init_task: int | None = option(0, "for EXACT_SOURCE_TASK: which of its tasks")
    num_ranks: int | None = option(1, "rank of a task's matrix")
    num_tasks: int | None = option(1, "how many tasks")

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        self.prompt_tuning_init = one_of("prompt_tuning_init", kind, ["RANDOM", "TEXT", *_SOURCES])
        in_range("num_ranks", self.num_ranks, 1)
        in_range("num_tasks", self.num_tasks, 1)
        if kind == "TEXT" and not (self.prompt_tuning_init_text and self.tokenizer_name_or_path):
            raise ConfigError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text and tokenizer_name_or_path")
        if kind in _SOURCES and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(f"prompt_tuning_init={kind!r} needs prompt_tuning_init_state_dict_path")


@method("MULTITASK_PROMPT_TUNING", config=MultitaskPromptTuningConfig, small={"num_virtual_tokens": 3})
class MultitaskPromptTuning(EmbeddedPrompt):
    """E' = [P * (U_k V_k); E(ids)]  for a row of task k                                    arXiv:2303.02861, section 3.1

    P (n, dim), U (tasks, n, ranks), V (tasks, ranks, dim) trained; * is elementwise. `task_ids` (batch,) says k. In an
    encoder-decoder model P has 2 n rows: the first half is the encoder's, the second the decoder's.
    """

    decoder_too = True
    takes = ("task_ids",)

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        read_model(cfg, model)
        rows = cfg.num_virtual_tokens * cfg.num_transformer_submodules
        super().__init__(cfg, rows, cfg.token_dim)
        shapes = (cfg.num_tasks, rows, cfg.num_ranks), (cfg.num_tasks, cfg.num_ranks, cfg.token_dim)
        for name, shape in zip(_FACTORS, shapes, strict=True):
            draw = torch.normal(0.0, 0.02, shape, generator=seeded(name))
            self.register_parameter(name, nn.Parameter(draw))
        if cfg.prompt_tuning_init in _SOURCES and not cfg.inference_mode:
            self.load(self.source(cfg))
        elif cfg.prompt_tuning_init == "TEXT" and not cfg.inference_mode and not (words := vocabulary(model)).is_meta:
            with torch.no_grad():
                self.embedding.weight.copy_(text_rows(cfg, words, rows))

    def source(self, cfg: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        path = Path(cfg.prompt_tuning_init_state_dict_path or "").expanduser()
        path = path / "adapter_model.safetensors" if path.is_dir() else path
        if path.suffix != ".safetensors" or not path.is_file():
            raise BadCheckpoint(f"prompt_tuning_init_state_dict_path: {path} is no safetensors file; pickles are not read")
        found = {k: v for k, v in load_file(path).items() if k in ("prompt_embeddings", *_FACTORS)}
        if cfg.prompt_tuning_init == "ONLY_SOURCE_SHARED":
            return {"prompt_embeddings": found["prompt_embeddings"]}
        one = slice(cfg.prompt_tuning_init_task, (cfg.prompt_tuning_init_task or 0) + 1)
        chosen = slice(None) if cfg.prompt_tuning_init == "AVERAGE_SOURCE_TASKS" else one
        return found | {name: found[name][chosen].mean(0, keepdim=True) for name in _FACTORS}

    def rows(self, batch: int) -> Tensor:
        ids = self.told("task_ids", batch)
        if ids is None and self.cfg.num_tasks > 1:
            raise ConfigError(f"task_ids: say which of the {self.cfg.num_tasks} tasks each row is, as a tensor (batch,)")
        ids = torch.zeros(batch, dtype=torch.long) if ids is None else ids
        U, V = (getattr(self, name).index_select(0, ids.to(self.table().device)) for name in _FACTORS)
        return self.table() * (U @ V)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {name: getattr(self, name) for name in _FACTORS}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        for name in _FACTORS:
            own, saved = getattr(self, name), tensors.get(name)
            if saved is not None and saved.shape != own.shape:
                raise BadCheckpoint(f"{name} is {tuple(saved.shape)} in the file and {tuple(own.shape)} by its config")
            own.data.copy_(own if saved is None else saved)

"""Prompt tuning: trained embeddings in front of the input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import seeded
from trimtab.core.config import method, one_of, option
from trimtab.errors import ConfigError
from trimtab.methods.prompt._virtual import _HEADS, Prompt, PromptConfig, first_of, read_model

if TYPE_CHECKING:
    from trimtab.core.group import Group


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
class PromptTuning(Prompt):
    """E' = [P; E(ids)],  P (n, dim) trained                                                   arXiv:2104.08691, section 2

    Logits of a language model have n positions more, at the front; labels are padded with -100 there. Under a task head
    the n positions are taken off again. In an encoder-decoder model the encoder gets P (the published table has 2 n rows,
    of which the second half is never read).
    """

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        read_model(cfg, model)
        super().__init__(cfg, cfg.num_virtual_tokens * cfg.num_transformer_submodules, cfg.token_dim)
        if not cfg.inference_mode:
            with torch.no_grad():
                self.embedding.weight.copy_(self.start(cfg, model))

    def start(self, cfg: PromptTuningConfig, model: Any) -> Tensor:
        rows, draw = len(self.embedding.weight), seeded("prompt_embeddings")
        if cfg.prompt_tuning_init == "RANDOM":
            return torch.randn(self.embedding.weight.shape, generator=draw)
        words = model.get_input_embeddings().weight.detach()
        if words.is_meta:  # a model that is a shape without weights
            return self.embedding.weight
        words = words.float().cpu()
        if cfg.prompt_tuning_init == "TEXT":
            from transformers import AutoTokenizer

            options = {k: v for k, v in (cfg.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
            ids = AutoTokenizer.from_pretrained(cfg.tokenizer_name_or_path, **options)(
                cfg.prompt_tuning_init_text
            ).input_ids
            return words[torch.tensor((ids * rows)[:rows])]
        return words[torch.randint(len(words), (rows,), generator=draw)]

    def attach(self, model: nn.Module, group: Group) -> list[Any]:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return self.attach_encoder(model, group)
        handles = super().attach(model, group)
        if self.cfg.task_type in _HEADS:
            backbone: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
            handles.append(backbone.register_forward_hook(partial(self.strip, group)))
        return handles

    def strip(self, group: Group, module: Any, args: Any, output: Any) -> Any:
        if group.live:
            output.last_hidden_state = output.last_hidden_state[:, self.n :]
        return output

    def attach_encoder(self, model: Any, group: Group) -> list[Any]:
        """The encoder gets the prompt whoever calls it; the decoder's view of its output only needs the wider mask."""
        return [
            model.get_encoder().register_forward_pre_hook(partial(self.before_encoder, group, model), with_kwargs=True),
            model.register_forward_pre_hook(partial(self.before_decoder, group), with_kwargs=True),
        ]

    def before_encoder(self, group: Group, model: Any, module: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        if not group.live:
            return None
        call = call | ({"input_ids": args[0]} if args else {})
        ids = first_of(call, "inputs_embeds", "input_ids")
        self.widen(call, "attention_mask", "position_ids", [], len(ids), self.n + ids.shape[1], ids.shape[1])
        self.insert(call, model, len(ids))
        return (), call

    def before_decoder(self, group: Group, module: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        if not group.live or call.get("attention_mask") is None:
            return None
        mask = call["attention_mask"]
        return args, call | {"attention_mask": torch.cat([mask.new_ones(len(mask), self.n), mask], dim=1)}

    def insert(self, call: dict[str, Any], model: Any, batch: int) -> None:
        n, ids = self.n, call.pop("input_ids", None)
        embeds = call.get("inputs_embeds")
        embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
        prompt = self.table()[:n].to(embeds.dtype).expand(batch, -1, -1)
        call["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        for name, fill in (("labels", -100), ("token_type_ids", 0), ("shift_labels", -100)):
            if isinstance(value := call.get(name), Tensor) and value.dim() == 2:
                call[name] = torch.cat([value.new_full((batch, n), fill), value], dim=1)
        if (positions := call.get("position_ids")) is not None:
            front = torch.arange(n, device=positions.device).expand(batch, -1)
            call["position_ids"] = torch.cat([front, positions.expand(batch, -1)], dim=1)
        if isinstance(keep := call.get("logits_to_keep"), Tensor):
            call["logits_to_keep"] = keep + n

"""Virtual tokens as embeddings in front of the input: prompt tuning and what makes its table in another way."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.methods.prompt._virtual import HEADED, Prompt, first_of

if TYPE_CHECKING:
    from trimtab.core.group import Group


class EmbeddedPrompt(Prompt):
    """E' = [P; E(ids)]

    Logits of a language model have n positions more, at the front; labels are padded with -100 there. Under a task head
    the n positions are taken off again. In an encoder-decoder model the encoder gets P (the published table has 2 n rows,
    of which the second half is never read).
    """

    def rows(self, batch: int) -> Tensor:
        """(batch, rows of the table, width)"""
        return self.table().expand(batch, -1, -1)

    decoder_too: ClassVar[bool] = False

    def attach(self, model: nn.Module, group: Group) -> list[Any]:
        handles = super().attach(model, group)
        if self.cfg.task_type in HEADED and not _has_encoder(model):
            backbone: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
            handles.append(backbone.register_forward_hook(partial(self.strip, group)))
        return handles

    def attach_insert(self, model: Any, group: Group) -> list[Any]:
        """Of two sides the encoder gets the prompt whoever calls it; the decoder's view of its output needs the wider mask."""
        if not _has_encoder(model):
            return super().attach_insert(model, group)
        names = list(inspect.signature(model.forward).parameters)
        return [
            model.get_encoder().register_forward_pre_hook(partial(self.before_encoder, group, model), with_kwargs=True),
            model.register_forward_pre_hook(partial(self.before_decoder, group, names), with_kwargs=True),
        ]

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
        within = self.heard
        try:  # `generate` calls the encoder by itself, with what it was told
            self.heard = {name: call.pop(name) for name in self.takes if name in call} or within
            self.insert(call, model, len(ids))
        finally:
            self.heard = within
        return (), call

    def before_decoder(
        self, group: Group, names: list[str], module: Any, args: tuple[Any, ...], call: dict[str, Any]
    ) -> Any:
        if not group.live:
            return None
        call = dict(zip(names, args, strict=False)) | call
        if (mask := call.get("attention_mask")) is not None:
            call["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.n), mask], dim=1)
        if self.decoder_too and self.cfg.num_transformer_submodules == 2:
            if first_of(call, "decoder_inputs_embeds", "decoder_input_ids") is None and call.get("labels") is not None:
                call["decoder_input_ids"] = module.prepare_decoder_input_ids_from_labels(labels=call["labels"])
            self.enter(call, module, names)
        return (), call

    def insert(self, call: dict[str, Any], model: Any, batch: int, side: str = "") -> None:
        n, ids = self.n, call.pop(f"{side}input_ids", None)
        embeds = call.get(f"{side}inputs_embeds")
        embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
        rows = self.rows(batch)
        prompt = (rows[:, n:] if side else rows[:, :n]).to(embeds.dtype)
        call[f"{side}inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        for name, fill in (("labels", -100), ("token_type_ids", 0), ("shift_labels", -100)):
            if isinstance(value := call.get(name), Tensor) and value.dim() == 2:
                call[name] = torch.cat([value.new_full((batch, n), fill), value], dim=1)
        if (positions := call.get(f"{side}position_ids")) is not None:
            front = torch.arange(n, device=positions.device).expand(batch, -1)
            call[f"{side}position_ids"] = torch.cat([front, positions.expand(batch, -1)], dim=1)
        if isinstance(keep := call.get("logits_to_keep"), Tensor):
            call["logits_to_keep"] = keep + n


def _has_encoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def vocabulary(model: Any) -> Tensor:
    """The model's word embeddings (words, width) in float32, or on no device, where the model is a shape without weights."""
    words = model.get_input_embeddings().weight.detach()
    return words if words.is_meta else words.float().cpu()


def text_rows(cfg: Any, words: Tensor, rows: int) -> Tensor:
    """The embeddings of a text, over and over, until there are enough."""
    from transformers import AutoTokenizer

    options = {k: v for k, v in (cfg.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    ids = AutoTokenizer.from_pretrained(cfg.tokenizer_name_or_path, **options)(cfg.prompt_tuning_init_text).input_ids
    return words[torch.tensor((ids * rows)[:rows])]

"""What all prompt methods share: n virtual tokens in front of every input, as embeddings or as keys and values.

One hook before the model's forward does it: while the cache is empty the virtual tokens are put in, afterwards only the
mask and the positions make room for them. `generate` is not touched; it equals greedy decoding by repeated forward.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import ModelAdapter, seeded
from trimtab.core.config import PeftConfig, in_range, option
from trimtab.errors import BadCheckpoint, ConfigError, NotSupported

if TYPE_CHECKING:
    from trimtab.core.group import Group

HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(kw_only=True)
class PromptConfig(PeftConfig):
    num_virtual_tokens: int = option(20, "number of virtual tokens")
    token_dim: int | None = option(None, "width of one; none: read off the model, as are the next three")
    num_transformer_submodules: int | None = option(None, "2 for encoder-decoder models")
    num_attention_heads: int | None = option(None, "attention heads")
    num_layers: int | None = option(None, "layers")
    modules_to_save: list[str] | None = option(None, "modules that are trained in full beside the prompt")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("num_virtual_tokens", self.num_virtual_tokens, 1)


def _first(config: Any, *names: str) -> Any:
    found = next((v for n in names if (v := getattr(config, n, None)) is not None), None)
    if found is None:
        raise NotSupported(
            f"a prompt method needs one of {', '.join(names)}, and the config of "
            f"{getattr(config, 'model_type', 'the model')!r} has none"
        )
    return found


def read_model(cfg: Any, model: nn.Module) -> Any:
    """The model's text config, with the sizes that `cfg` leaves open written into `cfg`, as published files have them."""
    config = getattr(model, "config", None)
    if config is None:
        raise NotSupported(f"{type(model).__name__} has no config: prompt methods go on transformers models")
    config = (
        config.get_text_config() if hasattr(config, "get_text_config") and not config.is_encoder_decoder else config
    )
    cfg.num_layers = cfg.num_layers or _first(config, "num_hidden_layers", "num_layers", "n_layer")
    cfg.token_dim = cfg.token_dim or _first(config, "hidden_size", "n_embd", "d_model")
    cfg.num_attention_heads = cfg.num_attention_heads or _first(
        config, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"
    )
    cfg.num_transformer_submodules = cfg.num_transformer_submodules or (2 if cfg.task_type == "SEQ_2_SEQ_LM" else 1)
    return config


class Prompt(ModelAdapter):
    """Holds the table of virtual tokens; `table()` (rows, width) is exactly what is saved, as `prompt_embeddings`. A
    `transform` makes it from a table of its own while training."""

    def __init__(self, cfg: Any, rows: int, width: int, transform: nn.Module | None = None) -> None:
        super().__init__()
        self.n, self.cfg, self.transform = cfg.num_virtual_tokens, cfg, transform
        self.embedding = nn.Embedding(rows, width)
        nn.init.normal_(self.embedding.weight, generator=seeded("prompt_embeddings"))
        for name, parameter in transform.named_parameters() if transform is not None else ():
            owner: Any = transform.get_submodule(name.rpartition(".")[0])  # type: ignore[union-attr]
            bound = (owner.hidden_size if isinstance(owner, nn.LSTM) else owner.in_features) ** -0.5  # as torch starts them
            nn.init.uniform_(parameter, -bound, bound, generator=seeded(f"prompt_embeddings/{name}"))

    def table(self) -> Tensor:
        return self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)

    def tensors(self) -> dict[str, Tensor]:
        training = self.training
        try:
            return {"prompt_embeddings": self.eval().table()}  # no dropout in what is saved
        finally:
            self.train(training)

    def fitting(self, saved: Tensor) -> Tensor:
        if saved.shape != (want := self.table().shape):
            raise BadCheckpoint(f"prompt_embeddings is {tuple(saved.shape)} in the file and {tuple(want)} by its config")
        return saved.detach().float()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Read a saved table. What made it (a projection) is not in the file: the table itself is what trains on."""
        own, saved = self.embedding.weight, self.fitting(tensors["prompt_embeddings"])
        if self.transform is None:  # in place: an optimizer may hold it
            own.data.copy_(saved)
        else:
            self.embedding = nn.Embedding.from_pretrained(saved.to(own.device, copy=True), freeze=not own.requires_grad)
            self.transform = None

    # -- what a caller says -------------------------------------------------------------------------------------------
    heard: dict[str, Any] = {}  # arguments of this call that are the method's own, by name

    def listen(self, group: Group, module: Any, args: Any, call: dict[str, Any]) -> Any:
        """Before the model's forward, which must not see them."""
        self.heard = {name: call.pop(name) for name in self.takes if name in call} if group.live else {}
        return args, call

    def forget(self, module: Any, args: Any, output: Any) -> None:
        self.heard = {}

    def told(self, name: str, batch: int) -> Any:
        """What the caller said under this name, a row for each of the batch."""
        value = self.heard.get(name)
        if value is not None and len(value) != batch:
            raise ConfigError(f"{name} has {len(value)} rows and the batch {batch}")
        return value

    # -- the hook -----------------------------------------------------------------------------------------------------
    def insert(self, call: dict[str, Any], model: nn.Module, batch: int, side: str = "") -> None:
        """Put the virtual tokens into a call whose cache is empty. `side`: `decoder_` in a model that has two."""
        raise NotImplementedError

    def attach(self, model: nn.Module, group: Group) -> list[Any]:
        if not self.takes:
            return self.attach_insert(model, group)
        listening = model.register_forward_pre_hook(partial(self.listen, group), with_kwargs=True)
        forgetting = model.register_forward_hook(self.forget, always_call=True)
        return [listening, *self.attach_insert(model, group), forgetting]

    def attach_insert(self, model: nn.Module, group: Group) -> list[Any]:
        where: Any = model
        if self.cfg.task_type in HEADED:  # under the head, so that labels and spans keep their positions
            where = getattr(model, getattr(model, "base_model_prefix", ""), model)
        names = list(inspect.signature(where.forward).parameters)
        return [where.register_forward_pre_hook(partial(self.before, group, names), with_kwargs=True)]

    def before(self, group: Group, names: list[str], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A bound method, as all hooks here: copies and pickles of the model then hook to their own group."""
        if not group.live:
            return None
        call = dict(zip(names, args, strict=False)) | kwargs
        self.enter(call, module, names)
        return (), call

    def enter(self, call: dict[str, Any], model: nn.Module, names: list[str]) -> None:
        if self.uses_cache and self.training and torch.is_grad_enabled():
            refuse_checkpointing(model)
        decoder = "decoder_" if "decoder_input_ids" in names else ""
        ids = first_of(call, f"{decoder}inputs_embeds", f"{decoder}input_ids", "labels" if decoder else "input_ids")
        if ids is None:
            raise ConfigError("the model was called without input_ids or inputs_embeds")
        cache_name = "cache" if "cache" in names else "past_key_values"
        cache = call.pop("past_key_values", None) if "past_key_values" in call else call.pop(cache_name, None)
        past = 0 if cache is None else int(cache.get_seq_length())
        call[cache_name] = cache
        batch, length = ids.shape[:2]
        self.widen(
            call, f"{decoder}attention_mask", f"{decoder}position_ids", names, batch, (past or self.n) + length, length
        )
        if not past:
            self.insert(call, model, batch, decoder)
        if call[cache_name] is None:
            del call[cache_name]

    uses_cache = False

    def widen(
        self,
        call: dict[str, Any],
        mask_name: str,
        position_name: str,
        names: list[str],
        batch: int,
        total: int,
        new: int,
    ) -> None:
        """Make room for the virtual tokens in mask and positions, by the mask: padding is never counted as a position."""
        mask, positions = call.get(mask_name), call.get(position_name)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise NotSupported("prompt methods take a 2-D attention mask, and no static cache")
            if mask.shape[1] < total:
                call[mask_name] = mask = torch.cat([mask.new_ones(batch, self.n), mask], dim=1)
        if positions is not None:
            call[position_name] = positions + self.n
        elif mask is not None and position_name in names and not mask.all():
            call[position_name] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -new:]


def refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise NotSupported(
            "gradient checkpointing drops the cache, and with it the prefix; turn it off for prefix tuning"
        )


def first_of(call: dict[str, Any], *names: str) -> Any:
    return next((call[n] for n in names if call.get(n) is not None), None)

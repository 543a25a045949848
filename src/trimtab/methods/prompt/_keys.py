"""Virtual tokens as keys and values of every layer: prefix tuning and cartridges."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from trimtab.errors import NotSupported
from trimtab.methods.prompt._virtual import Prompt, read_model, refuse_checkpointing

if TYPE_CHECKING:
    from trimtab.core.group import Group


def read_heads(cfg: Any, model: nn.Module) -> int:
    """The width of the table, 2 layers * kv_heads * head_dim; what `cfg` leaves open is written into it."""
    given = cfg.token_dim
    config = read_model(cfg, model)
    heads = getattr(config, "num_key_value_heads", None)
    if heads and given is None:  # the table holds keys and values, so its width counts their heads
        size = getattr(config, "head_dim", None) or cfg.token_dim // cfg.num_attention_heads
        cfg.token_dim, cfg.num_attention_heads = size * heads, heads
    _check(cfg, model, config)
    return 2 * cfg.num_layers * cfg.token_dim


def _check(cfg: Any, model: Any, config: Any) -> None:
    is_encoder_decoder, kind = getattr(config, "is_encoder_decoder", False), cfg.peft_type.lower().replace("_", " ")
    size, heads = getattr(config, "d_kv", None), cfg.num_attention_heads
    if size is not None and size * heads != cfg.token_dim:
        raise NotSupported(f"{kind}: {heads} heads of {size} are not token_dim={cfg.token_dim}")
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    if is_encoder_decoder and layers not in (None, cfg.num_layers):
        raise NotSupported(f"{kind}: {layers} decoder layers and {cfg.num_layers} encoder layers")
    if not is_encoder_decoder and not model.can_generate() and not hasattr(model, "score"):
        raise NotSupported(f"{type(model).__name__} is an encoder: it reads no cached keys, so {kind} would do nothing")


class KeyPrompt(Prompt):
    """K_i' = [P_2i; K_i],  V_i' = [P_2i+1; V_i]  in layer i

    Encoder-decoder models get it in the decoder, layer i reading slots 4i and 4i + 1 modulo 2 layers, as published
    checkpoints do.
    """

    uses_cache = True

    def attach(self, model: nn.Module, group: Group) -> list[Any]:
        refuse_checkpointing(model)
        handles = super().attach(model, group)
        return [*handles, model.register_forward_hook(partial(self.after, group), with_kwargs=True)]

    def after(self, group: Group, module: Any, args: Any, call: dict[str, Any], output: Any) -> Any:
        """The cache carried the prefix in; where the caller asked for none, none goes back."""
        if group.live and call.get("use_cache") is False and hasattr(output, "items"):
            return type(output)(**{k: v for k, v in output.items() if k not in ("cache", "past_key_values")})
        return output

    def insert(self, call: dict[str, Any], model: Any, batch: int, side: str = "") -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        name = "cache" if "cache" in call else "past_key_values"
        cache: Any = call[name]
        config = model.config
        pair = bool(getattr(config, "is_encoder_decoder", False))
        if cache is None:
            own = DynamicCache(config=config.get_text_config(decoder=True))
            cross = DynamicCache(config=config.get_text_config(decoder=True))
            cache = EncoderDecoderCache(own, cross) if pair else own
        call[name] = cache
        held = cache.self_attention_cache if pair else cache
        layers, heads = self.cfg.num_layers, self.cfg.num_attention_heads
        slots = (
            self.table().to(model.dtype).view(self.n, 2 * layers, heads, -1).permute(1, 2, 0, 3)
        )  # (2 layers, heads, n, dim)
        slots = slots[:, None].expand(-1, batch, -1, -1, -1)
        for i in range(layers):
            first = 4 * i % (2 * layers) if pair else 2 * i
            held.update(slots[first], slots[(first + 1) % (2 * layers)], i)

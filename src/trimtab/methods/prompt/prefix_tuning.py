"""Prefix tuning: trained keys and values in front of those of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.core.adapter import seeded
from trimtab.core.config import method, one_of, option
from trimtab.errors import NotSupported
from trimtab.methods.prompt._virtual import Prompt, PromptConfig, read_model, refuse_checkpointing

if TYPE_CHECKING:
    from trimtab.core.group import Group


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptConfig):
    encoder_hidden_size: int | None = option(None, "width of the projection's hidden layer; none: token_dim")
    prefix_projection: bool = option(False, "make the table by a two-layer network while training")
    init_weights: str | None = option(None, "zero: start at zero; none: N(0, 1), as published")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("init_weights", self.init_weights, [None, "zero"])


@method("PREFIX_TUNING", config=PrefixTuningConfig, small={"num_virtual_tokens": 3})
class PrefixTuning(Prompt):
    """K_i' = [P_2i; K_i],  V_i' = [P_2i+1; V_i]  in layer i                                   arXiv:2101.00190, eq. 3

    P (n, 2 layers * kv_heads * head_dim) trained, or made by Linear-Tanh-Linear from (n, token_dim); what is saved is P.
    Encoder-decoder models get it in the decoder, layer i reading slots 4i and 4i + 1 modulo 2 layers, as published
    checkpoints do.
    """

    uses_cache = True

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        given = cfg.token_dim
        config = read_model(cfg, model)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        heads = getattr(config, "num_key_value_heads", None)
        if heads and given is None:  # the table holds keys and values, so its width counts their heads
            size = getattr(config, "head_dim", None) or cfg.token_dim // cfg.num_attention_heads
            cfg.token_dim, cfg.num_attention_heads = size * heads, heads
        self.check(cfg, model, config)
        cfg.encoder_hidden_size = cfg.encoder_hidden_size or cfg.token_dim
        width = 2 * cfg.num_layers * cfg.token_dim
        project = cfg.prefix_projection and not cfg.inference_mode
        super().__init__(cfg, cfg.num_virtual_tokens, cfg.token_dim if project else width)
        self.transform: nn.Module | None = None
        nn.init.normal_(self.embedding.weight, generator=seeded("prefix"))
        last: Any = self.embedding
        if project:
            last = nn.Linear(cfg.encoder_hidden_size, width)
            self.transform = nn.Sequential(nn.Linear(cfg.token_dim, cfg.encoder_hidden_size), nn.Tanh(), last)
            for name, parameter in self.transform.named_parameters():
                bound = 0 if name.endswith("bias") else parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=seeded(f"prefix/{name}"))
        if cfg.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def check(self, cfg: Any, model: Any, config: Any) -> None:
        size, heads = getattr(config, "d_kv", None), cfg.num_attention_heads
        if size is not None and size * heads != cfg.token_dim:
            raise NotSupported(f"prefix tuning: {heads} heads of {size} are not token_dim={cfg.token_dim}")
        layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
        if self.is_encoder_decoder and layers not in (None, cfg.num_layers):
            raise NotSupported(f"prefix tuning: {layers} decoder layers and {cfg.num_layers} encoder layers")
        if not self.is_encoder_decoder and not model.can_generate() and not hasattr(model, "score"):
            raise NotSupported(
                f"{type(model).__name__} is an encoder: it reads no cached keys, so prefix tuning would do nothing"
            )

    def table(self) -> Tensor:
        return self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self.transform = None

    def attach(self, model: nn.Module, group: Group) -> list[Any]:
        refuse_checkpointing(model)
        handles = super().attach(model, group)
        return [*handles, model.register_forward_hook(partial(self.after, group), with_kwargs=True)]

    def after(self, group: Group, module: Any, args: Any, call: dict[str, Any], output: Any) -> Any:
        """The cache carried the prefix in; where the caller asked for none, none goes back."""
        if group.live and call.get("use_cache") is False and hasattr(output, "items"):
            return type(output)(**{k: v for k, v in output.items() if k not in ("cache", "past_key_values")})
        return output

    def insert(self, call: dict[str, Any], model: Any, batch: int) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        name = "cache" if "cache" in call else "past_key_values"
        cache: Any = call[name]
        config = model.config
        if cache is None:
            own = DynamicCache(config=config.get_text_config(decoder=True))
            cache = (
                EncoderDecoderCache(own, DynamicCache(config=config.get_text_config(decoder=True)))
                if self.is_encoder_decoder
                else own
            )
        call[name] = cache
        held = cache.self_attention_cache if self.is_encoder_decoder else cache
        layers, heads = self.cfg.num_layers, self.cfg.num_attention_heads
        slots = (
            self.table().to(model.dtype).view(self.n, 2 * layers, heads, -1).permute(1, 2, 0, 3)
        )  # (2 layers, heads, n, dim)
        slots = slots[:, None].expand(-1, batch, -1, -1, -1)
        for i in range(layers):
            first = 4 * i % (2 * layers) if self.is_encoder_decoder else 2 * i
            held.update(slots[first], slots[(first + 1) % (2 * layers)], i)

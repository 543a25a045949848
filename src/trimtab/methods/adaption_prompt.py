"""Adaption prompt (LLaMA-Adapter): tokens that the upper attentions also look at, behind a gate that starts closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapted, Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import PeftConfig, in_range, method, option
from trimtab.core.sites import layers, matches
from trimtab.errors import ConfigError, NotMergeable, NotSupported

_ATTENTION = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}


@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    target_modules: str | list[str] | None = option(None, "name of the attention modules; none: by model type")
    adapter_len: int | None = option(None, "how many tokens")
    adapter_layers: int | None = option(None, "how many layers, from the top")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is not None:
                in_range(name, getattr(self, name), 1)

    def places(self, model: Any) -> list[str]:
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise ConfigError(f"adaption prompt: {name} has no default; say how many")
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if self.target_modules is None and kind not in _ATTENTION:
            raise NotSupported(f"adaption prompt goes on {', '.join(_ATTENTION)} models, not on {kind or type(model).__name__}")
        self.target_modules = self.target_modules or _ATTENTION[kind]
        wanted = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        found = [name for name, _ in layers(model) if matches(name, wanted)]
        if found and len(found) < (self.adapter_layers or 0):
            raise ConfigError(f"adapter_layers={self.adapter_layers}, and the model has {len(found)} such modules")
        return found[-(self.adapter_layers or 0) :] or wanted


@method("ADAPTION_PROMPT", config=AdaptionPromptConfig, small={"adapter_len": 3, "adapter_layers": 1})
class AdaptionPrompt(Adapter):
    """y = Attn(x) + O(g softmax(q(x) k(P)^T / sqrt(dim)) v(P))                                arXiv:2303.16199, eq. 4-6

    P (1, len, hidden) and the gate g, which starts at 0, are trained; q, k, v, O are the module's own, with whatever stands
    on them. q is turned to its positions, k(P) is not. As published checkpoints have it, GPT-2's O is left out.
    """

    routed = on_modules = True

    def __init__(self, cfg: AdaptionPromptConfig, site: Site) -> None:
        super().__init__()
        config: Any = getattr(site.base.layer, "config", None)
        if getattr(config, "model_type", "") not in _ATTENTION or not hasattr(site.base.layer, "head_dim"):
            layer = type(site.base.layer).__name__
            raise NotSupported(
                f"adaption prompt does not fit {site.name!r} ({layer}): it goes on attention of {', '.join(_ATTENTION)}"
            )
        self.adaption_prompt = nn.Parameter(torch.empty(1, cfg.adapter_len or 0, config.hidden_size))
        self.adaption_gate = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.adaption_prompt, generator=site.generator("adaption_prompt"))

    def merged(self, site: Adapted) -> nn.Module:
        raise NotMergeable("an adaption prompt acts within attention: no weight would do the same")

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        y, *rest = base(x, *args, **kwargs)
        attention: Any = base.layer
        prompt = self.adaption_prompt.to(x.dtype)
        if hasattr(attention, "c_attn"):
            q, k, v = (attention.c_attn(x).chunk(3, -1)[0], *attention.c_attn(prompt).chunk(3, -1)[1:])
        else:
            q, k, v = attention.q_proj(x), attention.k_proj(prompt), attention.v_proj(prompt)
        q, k, v = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (q, k, v))  # (rows, heads, tokens, dim)
        if not hasattr(attention, "c_attn"):
            cos, sin = (t.unsqueeze(1) for t in kwargs.get("position_embeddings") or args[0])
            one, two = q.chunk(2, -1)
            q = q * cos + torch.cat([-two, one], -1) * sin
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1, dtype=torch.float32)
        more = ((self.adaption_gate * scores).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        more = more if hasattr(attention, "c_attn") else attention.o_proj(more)
        return (y + more.to(y.dtype), *rest)

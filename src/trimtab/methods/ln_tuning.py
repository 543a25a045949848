"""LN tuning: the norm layers are trained, as copies of themselves."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from trimtab.core.adapter import Adapted, Adapter, Site
from trimtab.core.base import Base, port
from trimtab.core.config import Excludes, Targets, method
from trimtab.core.sites import frozen, layers
from trimtab.errors import NotSupported

_TYPES = {
    "llama mistral gemma": "input_layernorm post_attention_layernorm norm",
    "gemma2 gemma3_text": "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm",
    "bloom falcon": "input_layernorm post_attention_layernorm ln_f",
    "llava": "input_layernorm post_attention_layernorm norm embed_tokens lm_head",
    "t5 mt5": "layer_norm final_layer_norm",
    "bart": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
    "gpt2": "ln_1 ln_2 ln_f",
    "gptj": "ln_1 ln_f",
    "phi": "input_layernorm final_layernorm",
    "qwen2 qwen3": "post_attention_layernorm",
    "blip-2": "layernorm LayerNorm final_layer_norm self_attn_layer_norm",
}


@dataclass(kw_only=True)
class LNTuningConfig(Targets, Excludes): ...


@method("LN_TUNING", config=LNTuningConfig)
class LNTuning(Adapter):
    """W' = W + (W* - W0),  b' = b + (b* - b0)                                                         arXiv:2312.11420

    W* and b*: a trained copy of the layer, any layer; W0 and b0: the frozen one. So W' = W* where this adapter is alone,
    and several add what they learned. Of a quantised layer the copy is dense.
    """

    additive = True
    targets = {kind: names.split() for kinds, names in _TYPES.items() for kind in kinds.split()}

    def __init__(self, cfg: LNTuningConfig, site: Site) -> None:
        super().__init__()
        site.need("LN tuning", "norm", "linear", "embedding", "conv")
        if not isinstance(site.base, type(port(site.base.layer))):
            raise NotSupported(f"LN tuning copies whole layers, and {site.name!r} has several weights: use modules_to_save")
        self.frozen = site.base
        self.ln_tuning_layers = _dense(site).requires_grad_(True)
        self.star = port(self.ln_tuning_layers)

    @classmethod
    def aim(cls, model: nn.Module) -> list[str]:
        """Every norm layer."""
        return [name for name, module in layers(model) if port(frozen(module)).op.kind == "norm"]

    def weight(self, w: Tensor) -> Tensor:
        return w + (self.star.weight() - self.frozen.weight())

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        new, old = self.star.bias(), self.frozen.bias()
        return b if b is None or new is None or old is None else b + (new - old)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        alone = not isinstance(base, Adapted) and base.layer is self.frozen.layer
        return base.op(x, self.star.weight(), self.star.bias()) if alone else super().forward(x, base)


def _dense(site: Site) -> nn.Module:
    """A copy of the layer whose weight can be trained."""
    if all(p.is_floating_point() for p in site.base.layer.parameters()):
        return copy.deepcopy(site.base.layer)
    if site.kind != "linear":
        raise NotSupported(f"LN tuning on {site.name!r}: no dense copy of such a quantised layer")
    b = site.base.bias()
    dense = nn.Linear(site.shape[1], site.shape[0], bias=b is not None)
    dense.weight.data = site.base.weight().detach().clone()
    if b is not None:
        dense.bias.data = b.detach().clone()
    return dense

"""X-LoRA: a small classifier, fed by a first pass of the model, says how much each LoRA adds at each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.call import Call
from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import PeftConfig, in_range, method, option
from trimtab.core.group import Group, adapted
from trimtab.errors import ConfigError, NotMergeable, NotSupported
from trimtab.methods._experts import Classifier, Experts


@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    target_modules: ClassVar[Any] = None  # the layers of the experts
    hidden_size: int | None = option(None, "width of the model's hidden states; none: read off the model")
    adapters: dict[str, str] | None = option(None, "the experts: folder by name; they count in the order of their names")
    enable_softmax: bool = option(True, "the experts' scalings of a token add up to 1")
    enable_softmax_topk: bool = option(False, "those of the top k do, instead")
    layerwise_scalings: bool = option(False, "each layer has scalings of its own")
    xlora_depth: int = option(1, "layers of the classifier")
    xlora_size: int = option(2048, "width of its inner layers")
    xlora_dropout_p: float = option(0.2, "dropout between them")
    use_trainable_adapters: bool = option(False, "train the experts too")
    softmax_temperature: float = option(1.0, "the classifier's answers are divided by it before the softmax")
    top_k_lora: int | None = option(None, "only so many experts act at a token")
    scaling_pass_value: float = option(0.0, "scaling of every expert in the first pass")
    global_scaling_weight: float = option(1.0, "all scalings are multiplied by it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters:  # a file sorts them, and the classifier's outputs are in their order: 2 before 10, a before b
            self.adapters = dict(sorted(self.adapters.items(), key=lambda kv: (len(kv[0]) if kv[0].isdigit() else 99, kv[0])))
        in_range("xlora_depth", self.xlora_depth, 1)
        in_range("xlora_dropout_p", self.xlora_dropout_p, 0, 1)
        if self.top_k_lora is not None:
            in_range("top_k_lora", self.top_k_lora, 1, len(self.adapters or {}) or float("inf"))
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise ConfigError("enable_softmax_topk needs top_k_lora: how many experts share the softmax")


@method("XLORA", config=XLoraConfig)
class XLora(Adapter):
    """y_t = W x_t + g sum_e p_te s_e B_e A_e x_t,  p_t = softmax(C(h_t) / T)                  arXiv:2402.07148, section 2

    h_t: the model's last hidden state of token t in a first pass without experts (or with all scaled by `scaling_pass_value`),
    a constant for the gradient; C the classifier, saved as `internal_xlora_classifier`. p (rows, tokens, layers, experts) is
    one for all layers unless `layerwise_scalings`; of p the largest `top_k_lora` act.
    """

    routed, among, uncached, targets = True, True, True, {}

    def __init__(self, cfg: XLoraConfig, site: Site) -> None:
        super().__init__()
        site.need("X-LoRA", "linear", "embedding")
        assert isinstance(site.shared, Classifier)
        self.cfg, self.site, self.call, self.adapter, self.shared = cfg, site.name, site.call, site.adapter, site.shared
        names = list(cfg.adapters or {})
        self.experts = Experts(site, names, "X-LoRA", some=True)
        self.columns, self.number = [names.index(n) for n in self.experts.names], site.shared.places.index(site.name)

    @classmethod
    def aim(cls, model: nn.Module) -> list[str]:
        if not (found := [path for path, layer in adapted(model) if layer.port.op.kind != "module"]):
            raise NotSupported("X-LoRA mixes LoRAs, and none stands on this model: `adapters` says where they are, by name")
        return found

    @classmethod
    def share(cls, cfg: XLoraConfig, sites: Sequence[Site]) -> nn.Module:
        return Classifier(cfg, [site.name for site in sites])

    def requires_grad_(self, requires_grad: bool = True) -> XLora:
        if self.cfg.use_trainable_adapters:
            for expert in self.experts():
                expert.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("X-LoRA weighs its experts token by token: it has no weight to merge, or for a method after it")

    def forward(self, x: Tensor, base: Base) -> Tensor:
        p = self.call.get(self.adapter)
        if p is None:
            raise NotSupported(f"X-LoRA: {self.site!r} was called by itself, and its scalings come with a forward of the model")
        p, y = self.shared.chosen(p[:, :, self.number]), base(x)
        if x.shape[: 2 if base.op.kind == "embedding" else -1] != p.shape[:2]:
            raise NotSupported(f"X-LoRA: {self.site!r} gets {(*x.shape,)}, not a vector for each of {(*p.shape[:2],)} tokens")
        for e, lora in zip(self.columns, self.experts(), strict=True):
            h = base.op(lora.drop(x), lora.lora_A.weight) * p[..., e, None]
            y = y + self.cfg.global_scaling_weight * lora.s * base.op.mix(h, lora.lora_B.weight)
        return y

    @classmethod
    def enter(cls, group: Group, call: Call, given: dict[str, Any]) -> Tensor | None:
        if call.asked.get("adapter_names") is not None:
            raise NotSupported(f"X-LoRA {group.name!r} reads the whole batch first, so it cannot share one with other adapters")
        model: Any = call.inside
        if call.cache is not None:
            raise NotSupported("X-LoRA reads the whole text for each new token, so it goes on from no cache: use_cache=False")
        assert isinstance(group.shared, Classifier)
        before, call.values = call.values, {group.name: group.shared.first_pass(given)}
        try:
            with torch.no_grad():
                first = {k: v for k, v in given.items() if k != "labels"} | {"output_hidden_states": True, "return_dict": True}
                hidden = getattr(model.forward(**first), "hidden_states", None)
        finally:
            call.values = before
        if not hidden:
            raise NotSupported(f"X-LoRA looks at hidden states, and {type(model).__name__} gives none of one text")
        return group.shared(hidden[-1])

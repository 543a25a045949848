"""What methods that mix the LoRAs of a layer share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Site, seeded
from trimtab.errors import NoMatch, NotSupported, nearest
from trimtab.methods.lora import LoRA


class Experts:
    """The LoRAs of these names at one site, found where they stand at each call: they belong to their own groups."""

    def __init__(self, site: Site, names: Sequence[str], method: str, *, some: bool = False) -> None:
        self.path, self.names, self.method = site.name, tuple(names), method
        self.beside: Any = site.beside or nn.ModuleDict()
        if some:  # an expert need not stand at all sites
            self.names = tuple(n for n in names if n in self.beside)
        self()

    def __call__(self) -> list[LoRA]:
        found: list[LoRA] = []
        for name in self.names:
            if name not in self.beside:
                more = f"{nearest(name, self.beside)} Here are: {', '.join(self.beside) or 'none'}. Load the experts first"
                raise NoMatch(f"{self.method} needs the LoRA {name!r} at {self.path!r}, a layer without it.{more}")
            lora: Any = self.beside[name]
            lora = getattr(lora, "inner", lora)  # within `rescale_adapter_scale`, where the mixture is scaled as a whole
            if type(lora) is not LoRA or lora.lora_B.bias is not None:
                kind = "a LoRA with a bias" if isinstance(lora, LoRA) else type(lora).__name__
                raise NotSupported(f"{self.method} mixes plain LoRAs; {name!r} at {self.path!r} is {kind}")
            found.append(lora)
        return found


class Classifier(nn.Module):
    """X-LoRA's: hidden states (rows, tokens, width) to scalings (rows, tokens, layers, experts)."""

    def __init__(self, cfg: Any, places: Sequence[str]) -> None:
        super().__init__()
        self.cfg, self.places, self.count = cfg, list(places), len(cfg.adapters)
        out = self.count * (len(places) if cfg.layerwise_scalings else 1)
        width, layers = cfg.hidden_size, list[nn.Module]()
        for i in range(cfg.xlora_depth - 1):
            layers += [_linear(width, cfg.xlora_size, i), nn.ReLU()]
            layers += [nn.Dropout(cfg.xlora_dropout_p)] if cfg.xlora_dropout_p else []
            width = cfg.xlora_size
        self.internal_xlora_classifier = nn.Module()
        self.internal_xlora_classifier.layers = nn.Sequential(*layers, _linear(width, out, cfg.xlora_depth))
        self.latest: Tensor | None = None
        self.logging, self.logged = False, list[Tensor]()

    def first_pass(self, given: dict[str, Any]) -> Tensor:
        ids: Any = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        if ids is None:
            raise NotSupported("X-LoRA goes on language models, and this one was called without input_ids or inputs_embeds")
        shape = (*ids.shape[:2], len(self.places), self.count)
        return torch.full(shape, float(self.cfg.scaling_pass_value), device=ids.device)

    def forward(self, hidden: Tensor) -> Tensor:
        layers: Any = self.internal_xlora_classifier.layers
        z = layers(hidden.to(layers[-1].weight.dtype)).unflatten(-1, (-1, self.count))
        z = z.expand(-1, -1, len(self.places), -1)
        if self.cfg.enable_softmax:
            z = (z / self.cfg.softmax_temperature).softmax(-1)
        self.latest = z
        if self.logging:
            self.logged.append(z)
        return z

    def chosen(self, p: Tensor) -> Tensor:
        """Of a layer's scalings (rows, tokens, experts) those that act."""
        if self.cfg.top_k_lora is not None:
            p = p * torch.zeros_like(p).scatter(-1, p.topk(self.cfg.top_k_lora, dim=-1).indices, 1)
        if self.cfg.enable_softmax_topk:
            p = torch.where(p == 0, -torch.inf, p).softmax(-1).nan_to_num(0)
        return p


def _linear(width: int, out: int, number: int) -> nn.Linear:
    """As torch starts one, from randomness of its own."""
    made = nn.Linear(width, out)
    for name, p in made.named_parameters():
        nn.init.uniform_(p, -(width**-0.5), width**-0.5, generator=seeded(f"xlora/{number}/{name}"))
    return made

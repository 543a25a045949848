"""What EVA sees of a model's layers, and how it spreads the ranks over them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.adapter import Site
from trimtab.errors import TrainingError, TrimtabWarning
from trimtab.inits import _calibrate as data
from trimtab.inits._spectrum import Components

PREFIX = "base_model.model."  # how a `PeftModel` calls its layers


def forward_fn_dict(model: Any, inputs: Any) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """(positions, 2): row and place of each token that is no padding and, with `use_label_mask`, has a label."""
    ids, own = model_input["input_ids"], peft_config.eva_config
    mask = model_input.get("attention_mask", torch.ones_like(ids)).bool()
    if own.use_label_mask and model_input.get("labels") is not None:
        mask = mask & (model_input["labels"] != own.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """(positions, in): the layer's input there."""
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    return x[model_input.T.unbind()]


def spread(sites: list[Site], cfg: Any, found: Mapping[str, Tensor]) -> None:
    """The config as the components have it, which each layer keeps for its adapter."""
    ranks, alphas, left, without = {}, {}, [], []
    for site in sites:
        r, alpha = site.pick(cfg.rank_pattern, cfg.r), site.pick(cfg.alpha_pattern, cfg.lora_alpha)
        A = found.get(site.name, found.get(PREFIX + site.name))
        new = r if A is None else len(A)
        if A is None:
            without.append(site.name)
        elif new:
            data.keep(site, "eva", A=A)
        if not new:
            continue
        left.append(site.name)
        if new != r and cfg.eva_config.adjust_scaling_factors:
            alpha *= new / r
        ranks |= {site.name: new} if new != cfg.r else {}
        alphas |= {site.name: alpha} if alpha != cfg.lora_alpha else {}
    if without:
        warnings.warn(f"EVA has seen nothing of {', '.join(without[:3])}: started as usual", TrimtabWarning)
    if len(left) < len(sites):
        cfg.target_modules = left
    cfg.rank_pattern, cfg.alpha_pattern = ranks, alphas


class Seen:
    """What the layers have got so far. Layers that get the same input share its components."""

    def __init__(self, sites: list[Site], cfg: Any, prepare: Any, prefix: str) -> None:
        self.sites, self.own, self.prepare, self.prefix = sites, cfg.eva_config, prepare, prefix
        self.ranks = {s.name: s.pick(cfg.rank_pattern, cfg.r) for s in sites}
        self.leaders: dict[str, str] = {}
        self.parts: dict[str, Components] = {}
        self.last: tuple[Tensor, str] | None = None
        self.batch: Any = None

    def next(self, batch: Any) -> None:
        self.batch, self.last = batch, None

    def look(self, site: Site, inputs: Any, _: Any) -> None:
        same = self.last is not None and inputs[0] is self.last[0] and not isinstance(self.prepare, Mapping)
        leader = self.leaders.setdefault(site.name, self.last[1] if same and self.last else site.name)
        if leader != site.name:
            return
        self.last, name = (inputs[0], site.name), self.prefix + site.name
        prepare = self.prepare.get(name) if isinstance(self.prepare, Mapping) else self.prepare
        rows = prepare(inputs, self.batch, name) if prepare else data.rows(inputs[0])
        if len(rows):
            most = max(round(r * self.own.rho) for r in self.ranks.values())
            self.parts.setdefault(site.name, Components(most)).see(rows.detach(), site.generator("eva"))

    def spread(self) -> Counter[str]:
        """The rank of each layer."""
        if missing := [name for name in self.ranks if self.leaders.get(name) not in self.parts]:
            raise TrainingError(f"EVA: no batch has an input for {missing[0]!r}. Fix: rows with labels, or no use_label_mask")
        shares = [
            (share, name)
            for name, r in self.ranks.items()
            for share in self.parts[self.leaders[name]].explained()[: round(r * self.own.rho)].tolist()
        ]
        best = sorted(shares, key=lambda pair: -pair[0])[: sum(self.ranks.values())]
        return Counter(name for _, name in best)

    def settled(self) -> bool:
        if any(self.leaders.get(name) not in self.parts for name in self.ranks):
            return False
        ranks = self.spread()
        return all(bool((self.parts[self.leaders[n]].similar[: ranks[n]] >= self.own.tau).all()) for n in self.ranks)

    def chosen(self) -> dict[str, Tensor]:
        ranks, found = self.spread(), {}
        for name in self.ranks:
            part = self.parts[self.leaders[name]]
            A = part.V[: ranks[name]]
            found[name] = A / part.S[: ranks[name], None].sqrt() if self.own.whiten else A.clone()
        return found

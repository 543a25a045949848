"""Adapters of any methods combined into one LoRA, from what each of them does to the weights.

    D = sum_i w_i D_i,   D_i = W'_i - W        and B A = D, or the nearest to it of a given rank, on every layer

An adapter enters by its D_i alone, so its method does not matter, nor its rank, nor the sign of its weight.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import store
from trimtab.core import group as groups
from trimtab.core.adapter import ModelAdapter, seeded
from trimtab.core.config import PeftConfig, in_range, method_of, one_of
from trimtab.core.full import FullTune
from trimtab.core.group import Group
from trimtab.core.layer import AdapterLayer
from trimtab.core.sites import ends_with, frozen, layers
from trimtab.deltas import Delta, Place, cut, places, published, wide
from trimtab.errors import ConfigError, NotSupported
from trimtab.methods.lora import LoraConfig
from trimtab.undone import undone

TYPES = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How deltas become one.

    svd, linear, cat             D = sum_i w_i D_i
    magnitude_prune, dare_linear the same of pruned ones: the largest entries stay, or random ones, those over `density`
    ties, dare_ties              pruned, then each entry is the mean of the w_i D_i that have the elected sign there

    With svd in the name D is cut to `rank` (default: the largest rank of the adapters). Without, it is exact: ranks add up;
    what is pruned there are the factors B and A. Signs can only be compared in D itself, so ties cuts to the sum of the ranks.
    """

    kind: str = "svd"
    rank: int | float | None = None  # a float: the share of the energy, sum of s^2, that is kept on each layer
    clamp: float | None = None
    driver: str | None = None
    density: float | None = None
    sign: str = "total"
    seed: str = ""

    def __post_init__(self) -> None:
        one_of("combination_type", self.kind, list(TYPES))
        one_of("majority_sign_method", self.sign, ["total", "frequency"])
        if self.kind not in ("svd", "linear", "cat"):
            if self.density is None:
                raise ConfigError(f"combination_type={self.kind!r} needs density, the share of the entries that is kept")
            in_range("density", self.density, 0, 1)
            if not self.density:
                raise ConfigError("density=0.0 would keep nothing")
        if isinstance(self.rank, float):
            in_range("rank (a float: the share of the energy)", self.rank, 0, 1)
        if self.rank is not None and (self.rank == 0 or not isinstance(self.rank, float)):
            in_range("rank", self.rank, 1)

    @property
    def cuts(self) -> bool:
        return self.kind.endswith("svd")

    @property
    def votes(self) -> bool:
        return "ties" in self.kind

    def prune(self, t: Tensor, place: str) -> Tensor:
        """What is left of a tensor: the `density` largest entries, or, for dare, random ones scaled by 1 / density."""
        if self.density is None or self.kind in ("svd", "linear", "cat"):
            return t
        if self.kind.startswith("dare"):
            drawn = torch.rand(t.shape, generator=seeded(f"{self.seed}/{place}")).to(t.device)
            return t * (drawn < self.density) / self.density
        kept = t.abs().flatten().topk(int(self.density * t.numel())).indices
        return torch.zeros_like(t).flatten().index_copy(0, kept, t.flatten()[kept]).view_as(t)

    def sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        weighted = torch.stack([w * t for w, t in zip(weights, tensors, strict=True)])
        if not self.votes:
            return weighted.sum(0)
        turned = torch.stack([t if w >= 0 else -t for w, t in zip(weights, tensors, strict=True)])  # what is elected is added
        votes = turned if self.sign == "total" else turned.sign()
        agree = turned.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


@dataclass
class Fit:
    """How near the combination is to what was asked: |B A - D| / |D| (Frobenius) by layer, and of all layers together."""

    ranks: dict[str, int] = field(default_factory=dict[str, int])
    errors: dict[str, float] = field(default_factory=dict[str, float])
    error: float = 0.0


def _blend(deltas: Mapping[str, Delta], weights: Sequence[float], recipe: Recipe, path: str, parts: int) -> tuple[Tensor, ...]:
    """B (out, r / parts), A (r, in * kernel) and the D that they are to be."""
    least = min(next(iter(deltas.values())).D.shape)
    if not recipe.cuts and not recipe.votes and parts == 1:  # exactly: B A = [B_1 B_2 ...] [w_1 A_1; w_2 A_2; ...]
        pairs = [(w, f"{path}/{name}", *d.split()) for w, (name, d) in zip(weights, deltas.items(), strict=True)]
        B = torch.cat([recipe.prune(B, f"{place}/B") for _, place, B, _ in pairs], 1)
        A = torch.cat([w * recipe.prune(A, f"{place}/A") for w, place, _, A in pairs])
        D = recipe.sum([d.D for d in deltas.values()], weights) if recipe.kind in ("linear", "cat") else B @ A
        return (B, A, D) if len(A) <= least or recipe.kind == "cat" else (*cut(D, least), D)
    D = recipe.sum([recipe.prune(d.D, f"{path}/{name}") for name, d in deltas.items()], weights)
    whole = [d.factors for d in deltas.values() if d.factors is not None] if recipe.kind == "svd" else []
    product = None
    if len(whole) == len(deltas):
        product = torch.cat([B for B, _ in whole], 1), torch.cat([w * A for w, (_, A) in zip(weights, whole, strict=True)])
    rank = recipe.rank
    if rank is None:
        ranks = [d.rank for d in deltas.values()]
        rank = max(1, max(ranks) if recipe.cuts else sum(ranks))
    if not isinstance(rank, float):
        rank = min(rank, least if parts == 1 else parts * min(D.shape[0] // parts, D.shape[1]))
    B, A = cut(D, rank, factors=product, parts=parts, driver=recipe.driver)
    if recipe.clamp is not None:
        most = torch.quantile(torch.cat([B.flatten(), A.flatten()]), recipe.clamp).item()
        B, A = B.clamp(-most, most), A.clamp(-most, most)
    return B, A, D


Chosen = list[tuple[Group, float]]


@torch.no_grad()
def combine(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], recipe: Recipe, *, progressbar: bool = False
) -> tuple[LoraConfig, dict[str, Tensor], Fit]:
    """The LoRA, as config and published tensors. Modules that were trained whole become W + sum_i w_i (W_i - W)."""
    chosen, fit, slabs = _chosen(model, adapters, weights), Fit(), False
    missed, size = defaultdict[str, float](float), defaultdict[str, float](float)
    tensors, biases, whole, parameters = dict[str, Tensor](), dict[str, Tensor](), list[str](), list[str]()
    for path, layer in _progress(list(groups.adapted(model)), progressbar):
        here = [(name, w) for g, w in chosen if (name := g.name) in layer.adapters]
        if any(isinstance(layer.adapters[name], FullTune) for name, _ in here):
            whole.append(path)
            tensors |= {f"{store.PREFIX}{path}.{k}": t for k, t in _whole(layer, here).items()}
            continue
        made = list[tuple[Place, list[tuple[Tensor, Tensor]]]]()
        for place in places(path, layer, [name for name, _ in here]) if here else []:
            pairs, split = list[tuple[Tensor, Tensor]](), place.base.op.groups
            for e, deltas in enumerate(place.deltas):
                at = f"{place.key}{e}"  # what is drawn there is drawn nowhere else
                B, A, D = _blend(deltas, [w for name, w in here if name in deltas], recipe, at, split)
                pairs.append((B, A))
                fit.ranks[place.name] = max(len(A), fit.ranks.get(place.name, 0))
                missed[place.name] += (place.base.op.full(B) @ A - D).norm().item() ** 2
                size[place.name] += D.norm().item() ** 2
                if not place.slab:
                    bias = (w * b for name, w in here if name in deltas and (b := deltas[name].bias) is not None)
                    biases[place.key] = sum(bias, D.new_zeros(len(D)))
            made.append((place, pairs))
            slabs |= place.slab
            parameters += [place.name] if place.name != path else []
        for place, pairs in made:  # one rank for what one pattern names
            r = fit.ranks[place.name]
            alike = [(wide(B, 1, r), wide(A, 0, r)) if len(A) < r else (B, A) for B, A in pairs]
            tensors |= published(place, alike)
    fit.errors = {name: (missed[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in fit.ranks}
    fit.error = (sum(missed.values()) / total) ** 0.5 if (total := sum(size.values())) else 0.0
    if biased := any(b.any() for b in biases.values()):
        if slabs:
            raise NotSupported("a LoRA with a bias is asked for by some layers, and experts in one slab take none")
        tensors |= {f"{store.PREFIX}{key}lora_B.bias": b for key, b in biases.items()}
    config = _config(model, chosen[0][0].config, fit.ranks, whole, parameters, lora_bias=biased)
    return config, tensors, fit


def _chosen(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> Chosen:
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights: one weight for each adapter, and one at least")
    if not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"weights={list(weights)}: each must be a finite number")
    if len({*adapters}) < len(adapters):
        raise ConfigError(f"adapters={list(adapters)}: each of them once")
    found = [(groups.group(model, name), float(w)) for name, w in zip(adapters, weights, strict=True)]
    for g, _ in found:
        if isinstance(g.adapter, ModelAdapter):
            kind = method_of(g.config).name
            raise NotSupported(f"adapter {g.name!r} ({kind}) changes no weight, so no LoRA can stand for it")
    return found


def _whole(layer: AdapterLayer, here: list[tuple[str, float]]) -> dict[str, Tensor]:
    """Of a module that some adapters have a trained copy of: its tensors, those of numbers moved by all of them."""
    found = {k: t.clone() for k, t in frozen(layer).state_dict().items()}
    before = {k: t.clone() for k, t in found.items()}
    for name, w in here:
        adapter: Any = layer.adapters[name]
        if not isinstance(adapter, FullTune):
            raise NotSupported(f"{name!r} adapts a layer that another adapter of the combination has a whole copy of")
        for k, t in adapter.copy.state_dict().items():
            found[k] = found[k] + w * (t - before[k]) if t.is_floating_point() else t
    return found


def _progress(items: list[tuple[str, AdapterLayer]], shown: bool) -> Iterable[tuple[str, AdapterLayer]]:
    if not shown:
        return items
    from tqdm import tqdm

    return tqdm(items, desc="layers")


def spread(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One value for most layers, and a pattern for those that have another."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {path: v for path, v in values.items() if v != most}


def _config(
    model: nn.Module, source: PeftConfig, ranks: dict[str, int], whole: list[str], parameters: list[str], *, lora_bias: bool
) -> LoraConfig:
    """alpha is the rank everywhere, so the product is not scaled."""
    if not ranks:
        raise NotSupported("these adapters train modules whole and adapt no layer, so there is nothing that a LoRA could say")
    r, other = spread(ranks)
    adapted = {path for path in ranks if path not in parameters}
    leaves = sorted({path.rpartition(".")[2] for path in adapted})
    meant = {n for n, _ in layers(model) if any(ends_with(n, leaf) for leaf in leaves)}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=leaves if meant == adapted else sorted(adapted),
        target_parameters=parameters or None,
        modules_to_save=whole or None,
        lora_bias=lora_bias,
        **{k: getattr(source, k) for k in ("task_type", "auto_mapping", "base_model_name_or_path", "revision")},
    )


def add_weighted_adapter(model: nn.Module, name: str, adapters: Sequence[str], weights: Sequence[float], recipe: Recipe) -> Fit:
    """Put the combination on the model as a LoRA beside the others, frozen and not active."""
    if name in groups.groups(model):
        raise ConfigError(f"an adapter is called {name!r} already; delete_adapter({name!r}) first, or choose another name")
    config, tensors, fit = combine(model, adapters, weights, recipe)
    group = groups.attach(model, config, name, strict=False)
    with undone(groups.delete, model, name):
        store.load(model, group, tensors)
    return fit

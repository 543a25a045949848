"""Adapters of any methods combined into one LoRA, from what each of them does to the weights.

    D = sum_i w_i D_i,   D_i = W'_i - W        and B A = D, or the nearest to it of a given rank, on every layer

An adapter enters by its D_i alone, so its method does not matter, nor its rank, nor the sign of its weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import store
from trimtab.core import group as groups
from trimtab.core.adapter import Adapter, ModelAdapter, seeded
from trimtab.core.base import port
from trimtab.core.config import PeftConfig, in_range, method_of, one_of
from trimtab.core.full import FullTune
from trimtab.core.group import Group
from trimtab.core.layer import AdapterLayer
from trimtab.core.sites import ends_with, frozen, layers
from trimtab.errors import ConfigError, NotMergeable, NotSupported
from trimtab.methods.lora import LoRA, LoraConfig
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


@dataclass
class Delta:
    """D (out, in * kernel) of one adapter on one layer, B and A where it is known as their product, the bias's part."""

    D: Tensor
    factors: tuple[Tensor, Tensor] | None
    bias: Tensor | None
    noise: float  # singular values below are rounding
    parts: int  # groups of a convolution, each of which has a share of a product's rank

    @classmethod
    def of(cls, layer: nn.Module, adapter: Adapter, where: str) -> Delta:
        base, training = port(frozen(layer)), adapter.training
        if base.op.kind in ("norm", "module"):
            raise NotSupported(f"{where}: a {base.op.kind} layer takes no low-rank product, so no LoRA can stand for it")
        adapter.eval()  # where training draws numbers
        try:
            w, b = base.weight(), base.bias()
            w = w.to(torch.promote_types(w.dtype, torch.float32))
            start = torch.zeros_like(w) if adapter.additive else w
            D, after = (adapter.weight(start) - start).flatten(1), adapter.bias(b, w)
        except NotMergeable as error:
            raise NotSupported(f"{where}: what it does is no change of a weight ({error})") from None
        finally:
            adapter.train(training)
        bias = after if after is None or b is None else after.to(w.dtype) - b.to(w.dtype)
        eps = torch.finfo(w.dtype).eps
        noise = eps * (max(D.shape) * D.norm().item() + (0 if adapter.additive else w.norm().item()))
        return cls(D, _factors(adapter, D), bias if bias is not None and bias.any() else None, noise, base.op.groups)

    @property
    def rank(self) -> int:
        if self.factors is not None:
            return self.factors[0].shape[1]
        return self.parts * max(int((torch.linalg.svdvals(part) > self.noise).sum()) for part in self.D.chunk(self.parts))

    def split(self) -> tuple[Tensor, Tensor]:
        return self.factors or cut(self.D, max(1, self.rank))


def _factors(adapter: Adapter, D: Tensor) -> tuple[Tensor, Tensor] | None:
    """B (out, r) and A (r, in * kernel) of a plain LoRA, if they say all that the adapter does."""
    plain: list[Any] = [m for m in adapter.modules() if type(m) is LoRA]
    for lora in plain:
        A, B = (t.to(D) for t in lora.factors())
        A, B = A.flatten(1), lora.s * B.flatten(1)
        fits = B.shape[0] == D.shape[0] and A.shape[1] == D.shape[1] and B.shape[1] == A.shape[0]
        if fits and lora.op.groups == 1 and (B @ A - D).norm() <= 1e-6 * D.norm():
            return B, A
    return None


def cut(
    D: Tensor, rank: int | float, *, factors: tuple[Tensor, Tensor] | None = None, parts: int = 1, driver: str | None = None
) -> tuple[Tensor, Tensor]:
    """B = U S and A = V of the nearest product of this rank. `factors`: B and A with B A = D, which make it cheaper;
    `parts`: the groups of a convolution, each with its own share of the rank."""
    if factors is not None and factors[0].shape[1] < min(D.shape) and parts == 1:
        (Qb, Rb), (Qa, Ra) = (torch.linalg.qr(t) for t in (factors[0], factors[1].T))
        U, S, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        found = [(Qb @ U, S, V @ Qa.T)]
    else:
        found = [torch.linalg.svd(part, full_matrices=False, driver=driver) for part in D.chunk(parts)]
    k = max(_energy(S, rank) for _, S, _ in found) if isinstance(rank, float) else -(-rank // parts)
    pairs = [(_wide(U * S, 1, k), _wide(V, 0, k)) for U, S, V in found]
    return torch.cat([B for B, _ in pairs]), torch.cat([A for _, A in pairs])


def _energy(S: Tensor, share: float) -> int:
    energy = S.double().square().cumsum(0)
    return min(int((energy < share * energy[-1]).sum()) + 1, len(S))


def _wide(t: Tensor, dim: int, size: int) -> Tensor:
    """The first `size` columns or rows; zeros where there are not so many."""
    lack = size - t.shape[dim]
    return t.narrow(dim, 0, size) if lack <= 0 else torch.cat([t, t.new_zeros(*t.shape[:dim], lack, *t.shape[dim + 1 :])], dim)


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
    chosen, fit, missed, size = _chosen(model, adapters, weights), Fit(), 0.0, 0.0
    tensors, biases, whole = dict[str, Tensor](), dict[str, Tensor](), list[str]()
    for path, layer in _progress(list(groups.adapted(model)), progressbar):
        here = [(name, w) for g, w in chosen if (name := g.name) in layer.adapters]
        if any(isinstance(layer.adapters[name], FullTune) for name, _ in here):
            whole.append(path)
            tensors |= {f"{store.PREFIX}{path}.{k}": t for k, t in _whole(layer, here).items()}
        elif here:
            base = port(frozen(layer))
            deltas = {name: Delta.of(layer, layer.adapters[name], f"{name!r} on {path!r}") for name, _ in here}  # type: ignore[arg-type]
            B, A, D = _blend(deltas, [w for _, w in here], recipe, path, base.op.groups)
            biases[path] = sum((w * b for name, w in here if (b := deltas[name].bias) is not None), D.new_zeros(len(D)))
            a, b = ("embedding_A", "embedding_B") if base.op.kind == "embedding" else ("A.weight", "B.weight")
            tensors[f"{store.PREFIX}{path}.lora_{a}"] = A.reshape(-1, *base.shape[1:]).contiguous()
            tensors[f"{store.PREFIX}{path}.lora_{b}"] = B.reshape(*B.shape, *[1] * len(base.shape[2:])).contiguous()
            lost, norm = (base.op.full(B) @ A - D).norm().item(), D.norm().item()
            fit.ranks[path], fit.errors[path] = len(A), lost / norm if norm else 0.0
            missed, size = missed + lost**2, size + norm**2
    fit.error = (missed / size) ** 0.5 if size else 0.0
    if biased := any(b.any() for b in biases.values()):
        tensors |= {f"{store.PREFIX}{path}.lora_B.bias": b for path, b in biases.items()}
    return _config(model, chosen[0][0].config, fit.ranks, whole, lora_bias=biased), tensors, fit


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


def _config(model: nn.Module, source: PeftConfig, ranks: dict[str, int], whole: list[str], *, lora_bias: bool) -> LoraConfig:
    """alpha is the rank everywhere, so the product is not scaled."""
    if not ranks:
        raise NotSupported("these adapters train modules whole and adapt no layer, so there is nothing that a LoRA could say")
    r, other = spread(ranks)
    leaves = sorted({path.rpartition(".")[2] for path in ranks})
    meant = {n for n, _ in layers(model) if any(ends_with(n, leaf) for leaf in leaves)}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=leaves if meant == {*ranks} else [*ranks],
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

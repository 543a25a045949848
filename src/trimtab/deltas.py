"""What adapters do to the weights of a layer, as matrices: D = W' - W, of each weight that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab import store
from trimtab.bases._parts import Part, Parts, Slab, split, stacked
from trimtab.core.adapter import Adapter
from trimtab.core.base import Base, bases, port
from trimtab.core.layer import AdapterLayer
from trimtab.core.sites import frozen
from trimtab.errors import NotMergeable, NotSupported
from trimtab.methods.lora import LoRA


@dataclass
class Delta:
    """D (out, in * kernel) of one adapter on one layer, B and A where it is known as their product, the bias's part."""

    D: Tensor
    factors: tuple[Tensor, Tensor] | None
    bias: Tensor | None
    noise: float  # singular values below are rounding
    parts: int  # groups of a convolution, each of which has a share of a product's rank

    @classmethod
    def of(cls, base: Base, adapter: Adapter, where: str) -> Delta:
        training = adapter.training
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

    @classmethod
    def of_each(cls, part: Part, slab: Slab) -> list[Delta]:
        """Of each expert of a slab."""
        w = part.shown(part.slab)
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        start = torch.zeros_like(w) if slab.additive else w
        D, pairs = slab.weight(start) - start, [None] * len(w)
        lora: Any = slab.each
        if type(lora) is LoRA:
            A, B = (split(k, t.to(w), slab.experts) for k, t in lora.named_parameters())
            pairs = [*zip(lora.s * B, A, strict=True)]
        noise = torch.finfo(w.dtype).eps * (max(w.shape[1:]) * D.norm(dim=(1, 2)) + start.norm(dim=(1, 2)))
        return [cls(d, pair, None, float(n), 1) for d, pair, n in zip(D, pairs, noise, strict=True)]

    def times(self, s: float) -> Delta:
        if s == 1:
            return self
        factors = None if self.factors is None else (s * self.factors[0], self.factors[1])
        return replace(self, D=s * self.D, factors=factors, bias=None if self.bias is None else s * self.bias)

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
    pairs = [(wide(U * S, 1, k), wide(V, 0, k)) for U, S, V in found]
    return torch.cat([B for B, _ in pairs]), torch.cat([A for _, A in pairs])


def _energy(S: Tensor, share: float) -> int:
    energy = S.double().square().cumsum(0)
    return min(int((energy < share * energy[-1]).sum()) + 1, len(S))


def wide(t: Tensor, dim: int, size: int) -> Tensor:
    """The first `size` columns or rows; zeros where there are not so many."""
    lack = size - t.shape[dim]
    return t.narrow(dim, 0, size) if lack <= 0 else torch.cat([t, t.new_zeros(*t.shape[:dim], lack, *t.shape[dim + 1 :])], dim)


@dataclass
class Place:
    """One weight that a LoRA is for: a layer's, or that of a part of it; there each adapter's delta, expert by expert."""

    key: str  # where a file holds its tensors
    name: str  # what patterns call it
    base: Base
    deltas: list[dict[str, Delta]]

    @property
    def slab(self) -> bool:
        return isinstance(self.base, Part) and self.base.experts > 0


def places(path: str, layer: AdapterLayer, names: Sequence[str]) -> list[Place]:
    adapters: dict[str, Any] = {name: layer.adapters[name] for name in names}
    base, where = port(inner := frozen(layer)), {name: f"{name!r} on {path!r}" for name in names}
    if not any(isinstance(a, Parts) for a in adapters.values()):
        return [Place(f"{path}.", path, base, [{n: Delta.of(base, a, where[n]) for n, a in adapters.items()}])]
    if whole := [n for n, a in adapters.items() if not isinstance(a, Parts)]:
        raise NotSupported(f"{where[whole[0]]}: another adapter of the combination changes single weights in this layer")
    if not base.parts:
        wanted = {part.name for a in adapters.values() for part in a.of}
        make: Any = bases()["parameters"]
        base = make(inner, [n for n, _ in inner.named_parameters(recurse=False) if n in wanted])
    found = list[Place]()
    for part in base.parts.values():
        assert isinstance(part, Part)
        mine = {n: (a, one) for n, a in adapters.items() for p, one in zip(a.of, a.parts, strict=True) if p.name == part.name}
        each = {
            n: [d.times(a.multiplier) for d in (Delta.of_each(part, one) if part.experts else [Delta.of(part, one, where[n])])]
            for n, (a, one) in mine.items()
        }
        deltas = [dict(zip(each, some, strict=True)) for some in zip(*each.values(), strict=True)]
        name = f"{path}.{part.name}" if base.op.kind == "experts" else path
        found.append(Place(f"{path}.{part.prefix}", name, part, deltas))
    return found


def published(place: Place, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """As published: of a slab all experts' in one."""
    a, b = ("embedding_A", "embedding_B") if place.base.op.kind == "embedding" else ("A.weight", "B.weight")
    if place.slab:
        found = {f"lora_{k}": stacked(f"lora_{k}", [*some]) for k, some in zip((b, a), zip(*pairs, strict=True), strict=True)}
    else:
        (B, A), *_ = pairs
        shape = place.base.shape
        found = {f"lora_{a}": A.reshape(-1, *shape[1:]), f"lora_{b}": B.reshape(*B.shape, *[1] * len(shape[2:]))}
    return {f"{store.PREFIX}{place.key}{k}": t.contiguous() for k, t in found.items()}

"""What cannot be merged, told before anything is trained. Merging itself finds the same, and raises."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from trimtab.core.adapter import Adapter
from trimtab.core.base import Base
from trimtab.core.group import Group
from trimtab.errors import TrimtabWarning

SIZE = 0.1  # of what is put into factors that start at zero


def warn(group: Group) -> None:
    """One line where an adapter that could be merged elsewhere cannot be on some of its layers."""
    if paths := mixing(group):
        more = ", ..." if len(paths) > 3 else ""
        warnings.warn(
            f"adapter {group.name!r} mixes the groups of {len(paths)} convolutions ({', '.join(paths[:3])}{more}), which no "
            "weight of theirs holds: it can be trained and saved there, and not merged. To merge it later, leave them out "
            "(exclude_modules), or take a method that keeps to the groups (ia3, loha, hira)", TrimtabWarning, stacklevel=2
        )  # fmt: skip


def never(group: Group) -> str:
    """Why an adapter cannot be merged whatever it stands on, or ""."""
    name = type(group.config).__name__.removesuffix("Config")
    if group.adapter is not None:
        return f"{name} is no change of a weight: it is used beside the model, and cannot be merged"
    if any(adapter.routed for _, adapter in group.sites()):
        return f"what {name} does depends on its input: it is used beside the model, and cannot be merged"
    return ""


def mixing(group: Group) -> list[str]:
    """The paths of convolutions with groups at which an input of one group reaches an output of another."""
    found: list[str] = []
    seen: dict[Any, bool] = {}
    for path, adapter in group.sites():
        base = group.layers[path].port
        if base.op.groups == 1 or adapter.routed or any(p.is_meta for p in adapter.parameters()):
            continue
        kind = (type(adapter), base.shape, base.op.groups)
        if kind not in seen:
            seen[kind] = _mixes(adapter, base, [] if group.shared is None else group.shared.parameters())
        found += [path] if seen[kind] else []
    return found


@torch.no_grad()
def _mixes(adapter: Adapter, base: Base, shared: Iterable[Tensor]) -> bool:
    """Tried on every other group, with all factors moved away from zero and then put back: no dense weight is made, where
    the method makes none. Draws no random number that the run would miss."""
    factors = {p: p.clone() for p in (*adapter.parameters(), *shared) if p.is_floating_point()}
    draw, training = torch.Generator().manual_seed(0), adapter.training
    groups, (_, fan_in, *kernel), layer = base.op.groups, base.shape, cast(Any, base.layer)
    wide = [(k - 1) * d + 1 for k, d in zip(kernel, layer.dilation, strict=True)]
    x = torch.randn(1, fan_in, *wide, generator=draw).to(base.device, base.dtype)
    other = torch.arange(fan_in, device=x.device).mul(groups).div(fan_in, rounding_mode="floor") % 2
    even, odd = (x * (other == side).view(-1, *[1] * len(kernel)) for side in (0, 1))
    try:
        adapter.eval()
        for p in factors:
            p += SIZE * torch.randn(p.shape, generator=draw).to(p)
        still = adapter(torch.zeros_like(x), base)
        outputs = torch.arange(still.shape[1], device=x.device).mul(groups).div(still.shape[1], rounding_mode="floor") % 2
        return any(
            not torch.equal(adapter(half, base)[:, outputs != side], still[:, outputs != side])
            for side, half in enumerate((even, odd))
        )
    finally:
        adapter.train(training)
        for p, before in factors.items():
            p.copy_(before)

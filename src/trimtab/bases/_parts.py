"""Layers with several weights, each adapted by itself: attention with its projections inside, slabs of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.adapter import Adapted, Adapter, Site
from trimtab.core.base import Base, rebuilt
from trimtab.core.ops import LinearOp
from trimtab.errors import NotMergeable, NotSupported


class Part(Base):
    """One weight of a layer, by its parameter's name, shown as (out, in); of a slab (experts, ...) that of one expert.
    `turned`: stored as (in, out). `prefix`: where the file holds its adapter."""

    def __init__(self, layer: nn.Module, name: str, prefix: str, *, turned: bool = False, expert: int = -1) -> None:
        self.name, self.prefix, self.turned, self.expert = name, prefix, turned, expert
        self.slab = layer.get_parameter(name)
        if not self.slab.is_floating_point() or self.slab.dtype.itemsize == 1:
            raise NotSupported(
                f"{name!r} of a {type(layer).__name__} is stored as {self.slab.dtype}: codes, which an adapter cannot be added"
                " to. Load the model with this layer unquantised"
            )
        if self.slab.dim() not in (2, 3):
            raise NotSupported(f"{name!r} of a {type(layer).__name__} has {self.slab.dim()} dimensions: 2 or 3 are adapted")
        out, fan_in = self.slab.shape[-2:][:: -1 if turned else 1]
        super().__init__(layer, LinearOp(layer), (out, fan_in))

    @property
    def dtype(self) -> torch.dtype:
        return self.slab.dtype

    @property
    def experts(self) -> int:
        return self.slab.shape[0] if self.slab.dim() == 3 else 0

    def of(self, expert: int) -> Part:
        return Part(self.layer, self.name, self.prefix, turned=self.turned, expert=expert)

    def shown(self, w: Tensor) -> Tensor:
        return w.mT if self.turned else w

    def weight(self) -> Tensor:
        return self.shown(self.slab[self.expert] if self.experts else self.slab)

    @property
    def bias_name(self) -> str:
        name = self.name.removesuffix("weight") + "bias"
        return name if name != self.name and name in dict(self.layer.named_parameters()) else ""

    def bias(self) -> Tensor | None:
        return self.layer.get_parameter(self.bias_name) if self.bias_name else None


class Slab(nn.Module):
    """W'_e = f_e(W_e) for each expert e, all in one product. Their tensors are stacked, (experts, ...), but for LoRA's, which
    files hold as A (experts r, in), expert by expert, and B (out, r experts), rank by rank."""

    def __init__(self, method: type[Adapter], cfg: Any, site: Site, part: Part) -> None:
        super().__init__()
        self.experts = part.experts
        made = [method(cfg, replace(site, base=part.of(e), adapter=f"{site.adapter}/{e}")) for e in range(self.experts)]
        _need_equation(made[0], site, part.of(0))
        self.each, self.names, self.additive = made[0], made[0].names, made[0].additive
        for place in ("_parameters", "_buffers"):
            for path, module in self.each.named_modules():
                for key, value in getattr(module, place).items():
                    if value is not None:
                        all_ = [getattr(m.get_submodule(path), key).detach() for m in made]
                        new = stacked(key if not path else f"{path}.{key}", all_)
                        getattr(module, place)[key] = nn.Parameter(new) if place == "_parameters" else new

    def weight(self, w: Tensor) -> Tensor:
        tensors = {**dict(self.each.named_parameters()), **dict(self.each.named_buffers())}
        each = {f"adapter.{k}": split(k, t, self.experts) for k, t in tensors.items()}
        equation = _Equation(self.each)
        return torch.vmap(lambda t, one: functional_call(equation, t, (one,)))(each, w)


class _Equation(nn.Module):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, w: Tensor) -> Tensor:
        return self.adapter.weight(w)


def stacked(key: str, tensors: list[Tensor]) -> Tensor:
    if key.endswith("lora_A.weight"):
        return torch.cat(tensors)
    return torch.stack(tensors, -1).flatten(1) if key.endswith("lora_B.weight") else torch.stack(tensors)


def split(key: str, t: Tensor, experts: int) -> Tensor:
    if key.endswith("lora_A.weight"):
        return t.unflatten(0, (experts, -1))
    return t.unflatten(1, (-1, experts)).permute(2, 0, 1) if key.endswith("lora_B.weight") else t


class Parts(Adapter):
    """The layer's own forward, with  W'_p = f_p(W_p)  for each of its weights p."""

    multiplier = 1.0  # within `rescale_adapter_scale`: how much of W'_p - W_p is added

    def __init__(self, method: type[Adapter], cfg: Any, site: Site) -> None:
        super().__init__()
        self.of: list[Part] = [*site.base.parts.values()]  # type: ignore[list-item]
        self.paths = [site.name + (f".{part.name}" if site.kind == "experts" else "") for part in self.of]  # for patterns
        made = [_adapter(method, cfg, site, *at) for at in zip(self.paths, self.of, strict=True)]
        self.parts, self.additive = nn.ModuleList(made), all(m.additive for m in made)
        self.starts_at_base = all(getattr(m, "each", m).starts_at_base for m in made)
        own = [f"parts.{i}." + ("each." if isinstance(m, Slab) else "") for i, m in enumerate(made)]
        inner = {o + k: p.prefix + v for o, p, m in zip(own, self.of, made, strict=True) for k, v in m.names.items()}
        self.names = inner | {o: p.prefix for o, p in zip(own, self.of, strict=True)}

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("a layer with several weights shows none of them to another adapter: merge this one first")

    def tensors(self, base: Base) -> dict[str, Tensor]:
        """All that the layer is called with instead of its own, by name; `base`: what stands beneath."""
        under = base
        if isinstance(under, Adapted) and not isinstance(under.adapter, Parts):
            raise NotSupported(f"{type(under.adapter).__name__} beneath an adapter of single weights: it shows none of them")
        found = under.adapter.tensors(under.base) if isinstance(under, Adapted) else {}  # type: ignore[union-attr]
        for part, adapter in zip(self.of, self.parts, strict=True):
            w = found.get(part.name, base.layer.get_parameter(part.name))
            new: Any = part.shown(self.share(part.shown(w), adapter.weight(part.shown(w))))  # type: ignore[operator]
            if part.bias_name and not isinstance(adapter, Slab):
                b = found.get(part.bias_name, base.layer.get_parameter(part.bias_name))
                found[part.bias_name] = self.share(b, adapter.bias(b, part.shown(w))).to(b.dtype)  # type: ignore[operator,union-attr]
            found[part.name] = new.to(part.dtype)
        return found

    def share(self, before: Any, after: Any) -> Any:
        return after if self.multiplier == 1 else before + self.multiplier * (after - before)

    def forward(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        return functional_call(base.layer, self.tensors(base), (x, *args), kwargs)

    def merged(self, site: Adapted) -> nn.Module:
        return _rebuilt(site.layer, self.tensors(site.base))


def _adapter(method: type[Adapter], cfg: Any, site: Site, name: str, part: Part) -> Any:
    site = replace(site, name=name, base=part, adapter=f"{site.adapter}/{part.name}")
    if part.experts:
        return Slab(method, cfg, site, part)
    made = method(cfg, site)
    _need_equation(made, site, part)
    return made


def _need_equation(adapter: Adapter, site: Site, part: Part) -> None:
    """The layer uses the weight inside, so all that an adapter does must be in its `weight`, and `bias` where there is one."""
    as_filed = any(m.as_filed for m in adapter.modules() if isinstance(m, Adapter))
    hooks = ("step", "penalty") if as_filed else ("pack", "unpack", "step", "penalty")
    books = [(getattr(type(adapter), hook), getattr(Adapter, hook)) for hook in hooks]
    with torch.no_grad():
        reasons = {
            "dropout acts on the input": any(isinstance(m, nn.Dropout) and m.p > 0 for m in adapter.modules()),
            "it draws numbers in training": adapter.noisy,
            "it acts on activations": adapter.routed,
            "its files and budgets count one weight a layer": any(a.__func__ is not b.__func__ for a, b in books),
            "it needs a bias": not part.bias_name and adapter.bias(None, part.weight()) is not None,
        }
    if reason := next((text for text, is_so in reasons.items() if is_so), ""):
        raise NotSupported(f"{type(adapter).__name__} on {site.name!r}: {reason}, and this weight is used inside the layer")


def _rebuilt(layer: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    new = rebuilt(layer, **{k: t for k, t in tensors.items() if "." not in k})
    new._modules = dict(layer._modules)
    for child in {k.partition(".")[0] for k in tensors if "." in k}:
        inner = {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{child}.")}
        new._modules[child] = rebuilt(getattr(layer, child), **inner)  # type: ignore[arg-type]
    return new

"""Where a call of the model begins: each row through its own adapter, and what methods read of the call.

    model(input_ids, adapter_names=["french", "__base__", "french"])
    model.generate(input_ids, adapter_names=["french", "law"], num_beams=4)

Two hooks on the model's forward do it, on the model itself, so that one with injected adapters takes the same arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trimtab.call import Call
from trimtab.core.adapter import Adapted, Adapter
from trimtab.core.base import Base
from trimtab.core.group import Group, adapted, calls, group, groups
from trimtab.core.layer import AdapterLayer
from trimtab.errors import ConfigError, NotSupported

BASE = "__base__"
_CACHES = ("cache", "past_key_values")  # the newer name first
_TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds")


class Rows:
    """The rows of each adapter in a mixed batch. A layer that stands in it is called once for each name, on its rows."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and other.names == self.names

    def of(self, *names: str) -> Tensor:
        return torch.tensor([i for i, n in enumerate(self.names) if n in names])

    def __call__(self, layer: AdapterLayer, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The same values and gradients as one batch for each adapter. Rows whose adapter has nothing here are the base's."""
        here = [n for n in dict.fromkeys(self.names) if n in layer.adapters]
        others = [n for n in dict.fromkeys(self.names) if n not in layer.adapters]
        stacks = [(layer.stack((n,)), (n,)) for n in here] + ([(layer.port, tuple(others))] if others else [])
        if len(stacks) == 1:
            return layer.through(stacks[0][0], x, *args, **kwargs)
        if layer.port.op.kind == "module" and all(layer.adapters[n].on_modules for n in here):
            return self.around(layer, stacks, x, args, kwargs)
        if not isinstance(x, Tensor) or any(isinstance(v, Tensor) for v in (*args, *kwargs.values())):
            raise NotSupported(f"{layer.path!r} gets more than one tensor, so its rows cannot be told apart")
        layer.call.check(x, len(self.names), layer.path)
        index = [self.of(*names).to(x.device) for _, names in stacks]
        parts = [layer.through(s, x[i], *args, **kwargs) for (s, _), i in zip(stacks, index, strict=True)]
        if not all(isinstance(part, Tensor) and len(part) == len(i) for part, i in zip(parts, index, strict=True)):
            raise NotSupported(f"{layer.path!r} gives something else than one row for each row that it gets")
        return torch.cat(parts)[torch.cat(index).argsort()]

    def around(self, layer: AdapterLayer, stacks: list[Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module is called once, for its cache is that of all rows; what stands around it then changes the rows of each."""
        layer.call.check(x, len(self.names), layer.path)
        y, size = layer.port(x, *args, **kwargs), len(self.names)
        index, parts = [self.of(*names).to(x.device) for _, names in stacks], []
        for (stack, _), i in zip(stacks, index, strict=True):
            own = _rows_of(y, i, size)
            if isinstance(stack, Adapted):
                more = {k: _rows_of(v, i, size) for k, v in kwargs.items()}
                with self.only(layer.call, i):
                    own = stack.adapter(x[i], Answered(layer.port, own), *_rows_of(args, i, size), **more)
            parts.append(own)
        order = torch.cat(index).argsort()
        first = parts[0]
        if isinstance(first, Tensor):
            return torch.cat(parts)[order]
        same = [v if not isinstance(v, Tensor) else torch.cat([part[k] for part in parts])[order] for k, v in enumerate(first)]
        return type(first)(same)

    @contextmanager
    def only(self, call: Call, index: Tensor) -> Generator[None]:
        """Within it layers get these rows alone: what stands around a module may use the layers of it."""
        whole, call.values = call.values, call.values | {"": Rows([self.names[i] for i in index.tolist()])}
        try:
            yield
        finally:
            call.values = whole


class Answered(Base):
    """A module that was called already."""

    def __init__(self, base: Base, answer: Any) -> None:
        super().__init__(base.layer, base.op, base.shape)
        self.answer = answer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.answer


def _rows_of(value: Any, index: Tensor, size: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_rows_of(v, index, size) for v in cast("tuple[Any, ...]", value))
    return value[index] if isinstance(value, Tensor) and value.dim() and len(value) == size else value


def watch(model: nn.Module) -> None:
    """Put the hooks on, once. An encoder is called by `generate` past the model's own forward, so it has them too."""
    if "trimtab_hooks" in model.__dict__:
        return
    calls(model)
    places: list[nn.Module] = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        places.append(cast(Any, model).get_encoder())
    handles = model.__dict__["trimtab_hooks"] = []
    for place in places:
        hook = partial(_enter, model, list(inspect.signature(place.forward).parameters))
        handles.append(place.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        handles.append(place.register_forward_hook(partial(_leave, model), always_call=True))


def taken(model: nn.Module) -> set[str]:
    """Arguments that are ours: they do not reach the model."""
    return {"adapter_names", *(name for g in groups(model).values() for name in g.kind.takes)}


@contextmanager
def generating(model: nn.Module, kwargs: dict[str, Any]) -> Generator[None]:
    """Within it each forward has the arguments that `generate` had, which are taken out of `kwargs`."""
    if any(g.live and g.adapter is None and g.kind.uncached for g in groups(model).values()):
        if kwargs.get("use_cache"):
            raise NotSupported("X-LoRA reads the whole text for each new token, so it has no cache: use_cache=False")
        kwargs["use_cache"] = False
    call = calls(model)
    call.scope = {name: kwargs.pop(name) for name in taken(model) if name in kwargs}
    try:
        yield
    finally:
        call.scope = {}


def present(model: nn.Module) -> list[Group]:
    """The groups that take part in the last forward: those that it named, else the active ones."""
    rows = calls(model).values.get("")
    known = groups(model).values()
    return [g for g in known if (g.live if rows is None else g.name in rows.names and not g.disabled)]


def _enter(owner: nn.Module, fields: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = calls(owner)
    if call.inside is not None:  # the encoder within the model's own forward
        return None
    call.inside, call.before = module, (call.values, call.number)
    call.kept = {}
    own = {k: v for k, v in kwargs.items() if k in taken(owner)}
    given = dict(zip(fields, args, strict=False)) | kwargs
    if not own and not call.scope and not any(_reads(g) for g in groups(owner).values() if g.live):
        _set(call, {})
        return None
    given = {k: v for k, v in given.items() if k not in own}
    size = _size(given)
    call.asked = {k: _spread(v, size) for k, v in call.scope.items()} | own
    call.cache = next((given[n] for n in _CACHES if given.get(n) is not None), None)
    call.tokens, call.size = any(given.get(n) is not None for n in _TOKENS), size
    asked = call.asked.get("adapter_names")
    values: dict[str, Any] = {} if asked is None else {"": _rows(owner, asked, size)}
    rows = values.get("")
    for g in filter(_reads, _asked(owner, rows)):
        value = g.kind.enter(g, call, given)
        if value is not None:
            values[g.name] = value if rows is None else value[rows.of(g.name).to(value.device)]
    _set(call, values)
    prompts = {n for g in groups(owner).values() if g.adapter is not None and g.live for n in g.kind.takes}  # they read it
    passed = {k: v for k, v in kwargs.items() if k not in own}
    return args, passed | {k: v for k, v in call.asked.items() if k in prompts}


def _reads(g: Group) -> bool:
    return g.adapter is None and g.kind.enter.__func__ is not cast(Any, Adapter.enter).__func__


def _asked(owner: nn.Module, rows: Rows | None) -> list[Group]:
    if any(g.disabled for g in groups(owner).values()):
        return []
    if rows is None:
        return [g for g in groups(owner).values() if g.live]
    return [group(owner, n) for n in dict.fromkeys(rows.names) if n != BASE]


def _rows(owner: nn.Module, names: Any, size: int) -> Rows:
    if isinstance(names, str) or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"adapter_names is a list with the name of an adapter, or {BASE!r}, for each row; found {names!r}")
    if len(names) != size:
        raise ConfigError(f"adapter_names has {len(names)} names for a batch of {size} rows: one for each row is needed")
    chosen = [group(owner, n) for n in dict.fromkeys(names) if n != BASE]
    prompts = [g.name for g in groups(owner).values() if g.adapter is not None and (g.live or g in chosen)]
    if prompts:
        raise NotSupported(
            f"{prompts[0]!r} is a prompt method: it makes rows longer, so it cannot share a batch with others. Call the model "
            "once for each, and set_adapter before"
        )
    if any(layer.merged_adapters for _, layer in adapted(owner)):
        raise NotSupported("adapters are merged, so no row can do without them: unmerge_adapter() before adapter_names")
    return Rows(names)


def _size(given: dict[str, Any]) -> int:
    """The rows of the batch: those of the first tensor, tokens before others."""
    ordered = [*(given.get(n) for n in _TOKENS), *given.values()]
    found = next((v for v in ordered if isinstance(v, Tensor) and v.dim()), None)
    if found is None:
        raise ConfigError("the model was called without a tensor whose rows could be counted")
    return len(found)


def _spread(value: Any, size: int) -> Any:
    """One value for each row of `generate`, for each of its beams."""
    if isinstance(value, str) or not hasattr(value, "__len__") or not len(value) or size % len(value):
        return value
    each = size // len(value)
    return value.repeat_interleave(each, 0) if isinstance(value, Tensor) else [v for v in value for _ in range(each)]


def _set(call: Call, values: dict[str, Any]) -> None:
    if values.keys() != call.values.keys() or not all(_same(v, call.values[k]) for k, v in values.items()):
        call.values, call.number = values, call.number + 1


def _same(a: Any, b: Any) -> bool:
    return a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)


def _leave(owner: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
    call = calls(owner)
    if call.inside is not module:
        return
    call.inside = None
    cache = next((c for n in _CACHES if (c := getattr(output, n, None)) is not None), None)
    if call.kept and cache is not None:
        cache.trimtab_call = call.kept
    call.cache = None
    if not torch.is_grad_enabled():  # nothing of it will be computed again
        call.values, call.number = call.before
    elif call.number and not torch.compiler.is_compiling():
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(call.begins, call.number))

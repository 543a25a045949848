"""`layer_replication`: a deeper model out of the layers it has. Copies share their weights; each has adapters of its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from trimtab.core.layer import AdapterLayer
from trimtab.errors import ConfigError, NotSupported

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in a model's config, an entry for each layer


class Replicated:
    """The model is changed when this is made, and as before after `undo()`; `keep()` makes it a plain model."""

    def __init__(self, model: Any, spans: list[list[int]]) -> None:
        self.spans, self.config = spans, _config(model)
        path, self.before = _stack(model, self.config)
        self.owner = model.get_submodule(path.rpartition(".")[0])
        self.name = path.rpartition(".")[2]
        n, order = len(self.before), [i for start, end in spans for i in range(start, end)]
        if not order or any(not 0 <= start < end <= n for start, end in spans):
            raise ConfigError(f"layer_replication={spans!r}: spans [from, to) of layers, 0 <= from < to <= {n}")
        self.values = {k: getattr(self.config, k) for k in PER_LAYER if len(getattr(self.config, k, None) or ()) == n}
        new = {k: [v[i] for i in order] for k, v in self.values.items()} | {"num_hidden_layers": len(order)}
        self.values["num_hidden_layers"] = n
        self.after = nn.ModuleList(_clone(self.before[i], at) for at, i in enumerate(order))
        self._put(self.after, new)

    def undo(self) -> None:
        self._put(self.before, self.values)

    def _put(self, layers: nn.ModuleList, values: dict[str, Any]) -> None:
        setattr(self.owner, self.name, layers)
        names: dict[str, str] = getattr(self.config, "attribute_map", {})
        self.config.__dict__.update({names.get(k, k): v for k, v in values.items()})  # at once: some check that they agree

    def keep(self) -> None:
        """The copies stay, as layers of their own: what they share could not be saved."""
        seen: set[int] = set()
        for module in self.after.modules():
            for key, p in module._parameters.items():
                if p is not None and id(p) in seen:
                    module._parameters[key] = copy.deepcopy(p)
                seen.add(id(p))


def prepare(cfg: Any, model: nn.Module) -> None:
    """Replicate the layers, unless an adapter that is there has done it."""
    spans = [list(span) for span in cfg.layer_replication]
    done: Replicated | None = model.__dict__.get("trimtab_shape")
    if done is not None:
        if done.spans != spans:
            raise ConfigError(f"layer_replication={spans!r}: the layers of this model are replicated as {done.spans!r} already")
        return
    if any(isinstance(m, AdapterLayer) for m in model.modules()):
        raise ConfigError("layer_replication changes the model: put this adapter on first, and the others after it")
    model.__dict__["trimtab_shape"] = Replicated(model, spans)


def _config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "num_hidden_layers", None) is None:
        raise NotSupported("layer_replication: the model's config has no num_hidden_layers")
    return config


def _stack(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    n = config.num_hidden_layers
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    found = [(name, m) for name, m in found if len({type(layer) for layer in m}) == 1 and any(True for _ in m.parameters())]
    outer = [(name, m) for name, m in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        names = ", ".join(repr(name) for name, _ in outer) or "none"
        raise NotSupported(f"layer_replication: one list of {n} layers is needed, and the model has {names}")
    return outer[0]


def _clone(layer: nn.Module, at: int) -> nn.Module:
    """A copy with the same parameters and buffers, that knows itself as layer number `at`: caches go by it."""
    shared = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    new = copy.deepcopy(layer, shared)
    for module in new.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = at  # type: ignore[assignment]
    return new

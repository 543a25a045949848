"""What an initialisation learns from the user's data: gathered on the bare model, kept by layer until the adapter is made."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.core import group as groups
from trimtab.core.adapter import Site
from trimtab.core.base import port
from trimtab.core.sites import find_sites, frozen
from trimtab.errors import ConfigError
from trimtab.inits._start import Started, init_of

_gathered: WeakKeyDictionary[nn.Module, dict[str, dict[str, Tensor]]] = WeakKeyDictionary()


def keep(site: Site, init: str, **statistics: Tensor) -> None:
    """For the adapter that is made on this layer next. It goes when the layer goes."""
    _gathered.setdefault(site.base.layer, {})[init] = statistics


def taken(site: Site, init: str) -> dict[str, Tensor] | None:
    """What is kept, once: another adapter on the layer is another matter."""
    return _gathered.get(site.base.layer, {}).pop(init, None)


def needed(site: Site, init: str, function: str) -> dict[str, Tensor]:
    """What is taken, or `ConfigError` with the function that gathers it."""
    if (found := taken(site, init)) is None:
        raise ConfigError(
            f"init_lora_weights={init!r} has seen no data at {site.name!r}: call {function}(model, config, ...) before "
            f"get_peft_model. A folder that was saved with this init, and without path_initial_model_for_weight_conversion, "
            f"does not hold the start that it needs, and cannot be loaded"
        )
    return found


def bare(model: Any) -> nn.Module:
    """The torch model: of a `PeftModel` the one inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def sites_of(model: Any, cfg: Any, adapter: str = "default") -> list[Site]:
    """The layers that the config names, or those that carry the adapter already."""
    torch_model, start = bare(model), init_of(cfg)
    if adapter in groups.groups(torch_model):
        carried = groups.group(torch_model, adapter)
        return [Site(path, port(frozen(carried.layers[path])), adapter) for path, _ in carried.each(Started)]
    found = find_sites(torch_model, cfg, {}, adapter)
    for site in found:
        start.fits(site, site.pick(cfg.rank_pattern, cfg.r))
    return found


@contextmanager
def watched(sites: Iterable[Site], look: Callable[[Site, Any, Any], None]) -> Generator[None]:
    """Within it, `look(site, inputs, output)` is called after each call of each layer."""
    handles = [s.base.layer.register_forward_hook(lambda _, x, y, s=s: look(s, x, y)) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Generator[None]:
    """The model in training or evaluation mode, and each of its modules as it was afterwards."""
    before = {m: m.training for m in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


def rows(x: Tensor) -> Tensor:
    """(tokens, in)"""
    return x.detach().reshape(-1, x.shape[-1])


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on the model's device. What is no tensor stays as it is."""
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(moved(v, device) for v in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def remade(model: nn.Module, old: groups.Group) -> None:
    """Put an adapter on anew, as its config is now."""
    tensors = [p for part in old.parts() for p in part.parameters()]
    trained, full = any(p.requires_grad for p in tensors), all(p.dtype.itemsize > 2 for p in tensors)
    active = groups.active(model)
    groups.delete(model, old.name)
    groups.attach(model, old.config, old.name, full_precision=full)
    groups.activate(model, active, trainable=trained)


def of_the_first(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first of several processes has found."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(held := [found])
        return held[0]
    return found


def read_cache(file: str | Path | None) -> dict[str, Tensor] | None:
    """Tensors that an earlier run has left there."""
    path = Path(file) if file is not None else None
    return torch.load(path, weights_only=True) if path is not None and path.is_file() and path.stat().st_size else None


def write_cache(file: str | Path | None, tensors: dict[str, Tensor]) -> None:
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)


def cached(tensors: dict[str, Tensor], key: str, file: Any) -> Tensor:
    if key not in tensors:
        raise ConfigError(f"{file} has no {key!r}: it was gathered for other layers. Fix: another file name, or delete it")
    return tensors[key]

"""A merged model, written shard by shard: beside the base there is never more than one shard of it in memory.

Layers are merged one at a time, in float32, rounded once to what is written, put into the current shard, and let go
when the shard is on disk. Models whose tensors have other names in their files than in memory are written whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab import states
from trimtab.core.layer import AdapterLayer
from trimtab.core.sites import frozen, layers
from trimtab.errors import NotMergeable
from trimtab.headers import INDEX, tensors
from trimtab.verbs import Verbs, has_new_bias, tell_new_biases, untie

SHARD = 2 * 2**30  # bytes


def write(model: Verbs, base: Path, dtype: torch.dtype, folder: Path) -> bool:
    """Merge `model`'s active adapters and write the plain model in `dtype`; `base`: the folder it was loaded from. True:
    shard by shard. `model` is spent afterwards."""
    plain: Any = model.get_base_model()
    order = states.to_merge(plain)
    if not _named_alike(plain, base):
        plain.float()
        merged = model.merge_and_unload().to(dtype)
        merged.save_pretrained(folder)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    shards, grown = _Shards(folder), list[str]()
    kept = [get() for get in (plain.get_input_embeddings, plain.get_output_embeddings)]  # to see whether they stay tied
    with torch.no_grad():
        for path, module in list(layers(plain)):
            for name, tensor in _unit(plain, path, module, order, dtype):
                shards.add(name, tensor, dtype)
            if isinstance(module, AdapterLayer):
                grown += [path] if has_new_bias(module) else []
                module.kept = []  # the layer as it was, in float32
            now = plain.get_submodule(path)
            if not any(module is k for k in kept):
                shards.after(now, deep=isinstance(module, AdapterLayer))
    shards.close()
    tell_new_biases(plain, grown)
    untie(plain)
    plain.config.architectures, plain.config.dtype = [type(plain).__name__], str(dtype).removeprefix("torch.")
    plain.config.save_pretrained(folder)
    if plain.can_generate():
        plain.generation_config.save_pretrained(folder)
    return True


def _named_alike(model: nn.Module, base: Path) -> bool:
    """Whether the files of the base hold the model's tensors under the names that the model has for them."""
    there = {name for _, name, _ in tensors(base)}
    here: dict[str, Tensor] = {}
    for path, module in layers(model):
        source = frozen(module)
        deep = isinstance(module, AdapterLayer)
        here |= {f"{path}.{k}" if path else k: v for k, v in _own(source, deep=deep)}
    held = Counter(id(t) for t in here.values())
    return there <= here.keys() and all(name in there or held[id(t)] > 1 for name, t in here.items())


def _own(module: nn.Module, *, deep: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that are saved, of a module alone or of all that is in it."""
    if deep:
        yield from module.state_dict(keep_vars=True).items()
        return
    unsaved: set[str] = module._non_persistent_buffers_set
    yield from ((k, p) for k, p in module._parameters.items() if p is not None)
    yield from ((k, b) for k, b in module._buffers.items() if b is not None and k not in unsaved)


def _unit(
    model: nn.Module, path: str, module: nn.Module, order: tuple[str, ...], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors under their names; a layer with adapters is merged first, and stands there as a plain one."""
    if not isinstance(module, AdapterLayer):
        yield from ((f"{path}.{k}" if path else k, t) for k, t in _own(module, deep=False))
        return
    held = [(p, p.data) for p in frozen(module).parameters() if p.is_floating_point()]
    for p, data in held:
        p.data = data.float()  # this layer alone, and only while it is merged
    module.merge(order)
    for p, data in held:
        p.data = data
    parent, _, leaf = path.rpartition(".")
    plain = model.get_submodule(parent)._modules[leaf] = module.base_layer.to(dtype)
    for name, tensor in plain.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotMergeable(f"merging gives a value in {path}.{name} that is not finite. Nothing was written")
        yield f"{path}.{name}", tensor


class _Shards:
    """Safetensors files of up to `SHARD` bytes, and their index. A tensor that two modules share is written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now: dict[str, Tensor] = {}
        self.size = self.total = 0
        self.files: list[list[str]] = []
        self.seen: dict[int, Tensor] = {}  # held, so that no other tensor gets the same id
        self.done: list[tuple[nn.Module, bool]] = []

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if id(tensor) in self.seen:
            return
        self.seen[id(tensor)] = tensor
        out = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).cpu().contiguous()
        size = out.numel() * out.element_size()
        if self.now and self.size + size > SHARD:
            self.flush()
        self.now[name] = out
        self.size += size

    def after(self, module: nn.Module, *, deep: bool) -> None:
        """`module` may let go of its tensors when they are written."""
        self.done.append((module, deep))

    def flush(self) -> None:
        if not self.now:
            return
        save_file(self.now, self.folder / f"part-{len(self.files)}", metadata={"format": "pt"})
        self.files.append(list(self.now))
        self.total += self.size
        self.now, self.size = {}, 0
        for module, deep in self.done:
            for one in module.modules() if deep else [module]:
                for key, p in one._parameters.items():
                    if p is not None and p.device.type != "meta":
                        self.seen.pop(id(p), None)
                        one._parameters[key] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        self.done = []

    def close(self) -> None:
        self.flush()
        n = len(self.files)
        names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        for i, name in enumerate(names):
            (self.folder / f"part-{i}").rename(self.folder / name)
        if n > 1:
            where = {key: name for name, keys in zip(names, self.files, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def in_float32(model: nn.Module) -> Generator[None, None, None]:
    """Within it, each layer computes in float32 with its weights raised for the time of its own forward: one layer of the
    model is held twice. What is stored stays as it was, bit for bit."""
    handles: list[Any] = []
    stored: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def raise_(module: nn.Module, args: Any, kwargs: Any) -> Any:
        own = [p for p in _weights(module) if p.dtype in (torch.float16, torch.bfloat16)]
        stored[module] = [(p, p.data) for p in own]
        for p in own:
            p.data = p.data.float()
        return None

    def lower(module: nn.Module, args: Any, output: Any) -> None:
        for p, data in stored.pop(module, []):
            p.data = data

    for _, module in layers(model.get_base_model() if isinstance(model, Verbs) else model):
        if _weights(module):
            handles.append(module.register_forward_pre_hook(raise_, with_kwargs=True))
            handles.append(module.register_forward_hook(lower, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module's forward reads: its own; of a layer with adapters, the frozen layer's too."""
    return list(module.parameters(recurse=isinstance(module, AdapterLayer)))

"""Where cartridges and prefixes start from, and how they are put together: the cache of a text, the tables of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab import store
from trimtab.core.config import PeftConfig, replaced
from trimtab.core.group import group
from trimtab.errors import ConfigError
from trimtab.files import write
from trimtab.methods.prompt._keys import KeyPrompt
from trimtab.methods.prompt.cartridge import CartridgeConfig

TABLE = "prompt_embeddings"


def _adapter(model: Any, name: str | None) -> KeyPrompt:
    chosen: str = name or model.active_adapter
    adapter: Any = group(model.get_base_model(), chosen).adapter
    if not isinstance(adapter, KeyPrompt):
        raise ConfigError(f"adapter {chosen!r} is no cartridge and no prefix: it does not start from a cache")
    if adapter.transform is not None:
        raise ConfigError(f"adapter {chosen!r} makes its table by a network (prefix_projection): it cannot start from a cache")
    return adapter


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache of one row as a table (n, 2 layers * kv_heads * head_dim)."""
    held = getattr(past_key_values, "self_attention_cache", past_key_values)
    pairs = [(layer.keys, layer.values) for layer in held.layers] if hasattr(held, "layers") else [p[:2] for p in held]
    if not pairs:
        raise ConfigError("the cache is empty")
    tensors: list[Tensor] = [t for pair in pairs for t in pair]  # each (1, kv_heads, tokens, head_dim)
    shapes = {(*t.shape[:2], *t.shape[3:]) for t in tensors}
    if len(shapes) > 1 or tensors[0].dim() != 4 or len(tensors[0]) != 1:
        raise ConfigError(f"a cartridge takes the cache of one row whose layers are alike; these are {sorted(shapes)}")
    if (length := min(t.shape[2] for t in tensors)) < num_virtual_tokens:
        raise ConfigError(f"the cache holds {length} tokens, and num_virtual_tokens={num_virtual_tokens}")
    slots = torch.stack([t[0, :, :num_virtual_tokens] for t in tensors])  # (2 layers, kv_heads, n, head_dim)
    return slots.permute(2, 0, 1, 3).reshape(num_virtual_tokens, -1)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Start a cartridge or a prefix as the first tokens of a cache; returns its table."""
    adapter = _adapter(model, adapter_name)
    table = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=num_virtual_tokens or adapter.n)
    adapter.load({TABLE: table})
    return table


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start a cartridge or a prefix as what the base model keeps of `text`, which stands as the system's message where the
    tokenizer has a chat template; returns its table."""
    adapter = _adapter(model, adapter_name)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        said = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=False, return_dict=False, return_tensors="pt")
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, :max_length].to(next(model.parameters()).device)
    with model.disable_adapter():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens or adapter.n
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Write the adapter that is these cartridges one after the other; of frozen tokens it has the first one's."""
    paths = [store.folder(p) for p in adapter_paths]
    if len(paths) < 2:
        raise ConfigError("at least two cartridges are put together")
    if not safe_serialization:
        raise ConfigError("safe_serialization=False would write a pickle; adapters are written as safetensors only")
    configs = [CartridgeConfig.from_pretrained(p) for p in paths]
    first: Any = configs[0]
    for path, config in zip(paths, configs, strict=True):
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, name) != getattr(first, name):
                raise ConfigError(f"{name} is {getattr(config, name)!r} in {path} and {getattr(first, name)!r} in {paths[0]}")
    table = torch.cat([store.read(p)[TABLE] for p in paths])
    whole: PeftConfig = replaced(first, num_virtual_tokens=len(table))
    folder = Path(output_path)
    write(folder / store.WEIGHTS_FILE, lambda file: save_file({TABLE: table}, file, metadata={"format": "pt"}))
    whole.save_pretrained(folder)

"""One tiny Llama for the tests of the model surface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
IDS = torch.tensor([[5, 9, 4, 7, 11], [3, 8, 6, 10, 12]])


def llama(seed: int = 0, **over: Any) -> Any:
    torch.manual_seed(seed)
    given: dict[str, Any] = dict(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**given | over)).eval()


def endless(times: float = 1) -> Any:
    """No token ends its answers; matrices `times` as large, so that what is routed by values is routed clearly."""
    made = llama(eos_token_id=None)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(times if p.dim() > 1 else 1)
    return made


def move(model: nn.Module, seed: int = 3, size: float = 0.2) -> None:
    """As training would: every trainable tensor away from its start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=draw))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

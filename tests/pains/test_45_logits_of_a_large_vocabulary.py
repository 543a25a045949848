"""No. 45: the loss of 128 thousand words takes less than half of the logits' memory, and is the plain loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from small_llama import llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab import LoraConfig, get_peft_model
from trimtab.data import Example
from trimtab.data.pack import pack
from trimtab.engine.forward import Engine

VOCABULARY, LENGTH = 128_000, 320


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made inside."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.most = max([self.most, *sizes])
        return out


def test_chunks_are_the_plain_loss_at_less_than_half_the_memory() -> None:
    model = get_peft_model(
        llama(vocab_size=VOCABULARY, hidden_size=4, intermediate_size=4, max_position_embeddings=512),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    ids = [3 + 97 * k for k in range(LENGTH)]
    engine, packed = Engine(model), pack([Example(ids, [True] * LENGTH, "rows.jsonl", 1, (0, 0))])
    with Largest() as chunked, engine.running():
        loss = engine.forward(model, packed).loss
        loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    with Largest() as whole:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        plain = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
        plain.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    share = float(loss.detach() / plain.detach())  # a pack's loss is a sum or a mean of tokens
    assert min(abs(share - 1), abs(share / (LENGTH - 1) - 1)) < 1e-5
    assert want.abs().max() > 0 and (grads / share - want).abs().max() < 1e-4 * want.abs().max()
    assert chunked.most * 2 <= whole.most and whole.most >= (LENGTH - 1) * VOCABULARY

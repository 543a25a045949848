"""Models of two layers and 32 units of many kinds, adapters on them, examples, and the loss of one example at a time."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.core.config import config_for
from trimtab.data import Example, collate
from trimtab.data.pack import packs
from trimtab.engine.forward import Engine
from trimtab.model import PeftModel, get_peft_model
from trimtab.train.objectives.sft import row_losses

VOCABULARY = 97
PAD, EOS = 0, 2
BASE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
)  # fmt: skip
LATENT = dict(  # keys 8 wide, values 6
    num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6
)  # fmt: skip

# name: (model type, what differs from BASE)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(head_dim=8)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral window": ("mistral", dict(sliding_window=6)),
    "gemma2": ("gemma2", dict(head_dim=8, sliding_window=6, attn_logit_softcapping=0.5, final_logit_softcapping=0.5)),
    "gemma3": ("gemma3_text", dict(head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"])),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)),
    "gpt2 no dropout": ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0,
                                     embd_pdrop=0.0)),
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "bloom": ("bloom", dict(n_layer=2, n_head=4)),
    "mamba": ("mamba", dict(state_size=4)),
    "stablelm": ("stablelm", {}),
    "cohere2": ("cohere2", dict(head_dim=8, sliding_window=6, logit_scale=0.25)),
    "granite": ("granite", dict(logits_scaling=4.0)),
    "gpt_oss": ("gpt_oss", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
                                rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "glm": ("glm", dict(head_dim=8)),
    "smollm3": ("smollm3", {}),
    "deepseek_v3": ("deepseek_v3", dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                                        moe_intermediate_size=16, first_k_dense_replace=1, **LATENT)),
    "qwen2_moe window": ("qwen2_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                           shared_expert_intermediate_size=16, use_sliding_window=True, sliding_window=6,
                                           max_window_layers=0)),
    "llama4": ("llama4_text", dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=512)),
}  # fmt: skip

# root mean square norms are computed in float32 by transformers, whatever the model's dtype: what is summed in another
# order there differs by that rounding
EXACT = ["phi", "gpt_neox", "gpt2 no dropout", "opt"]


def bare(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **over: Any) -> Any:
    """A random model of this kind whose logits are spread as those of a real one."""
    name, own = KINDS[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **BASE | own | over), experts_implementation="eager"  # grouped products take no float64
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)  # a start of 0.02 leaves attention all but even, and a wrong mask would hardly show
            elif not p.any():
                p.normal_(std=0.2)  # biases and sinks
    return model.to(dtype).requires_grad_(False)


def adapted(kind: str = "llama", *, dtype: torch.dtype = torch.float64, over: Any = (), **options: Any) -> PeftModel:
    """With LoRA on every linear layer, off its start so that no gradient is zero."""
    given = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": "all-linear"} | options
    return with_method(bare(kind, dtype=dtype, **dict(over)), "lora", **given)


def with_method(model: Any, method: str, **options: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "frozen though its neighbours are adapted: .*experts")  # they are meant to be here
        return moved(get_peft_model(model, config_for(method, task_type="CAUSAL_LM", **options)))


def moved(model: PeftModel) -> PeftModel:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tensors(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return model.train()


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every trained tensor; afterwards none is kept."""
    found = {name: p.grad for name, p in tensors(model).items()}
    model.zero_grad()
    assert all(g is not None for g in found.values())
    return found  # type: ignore[return-value]


def example(ids: list[int], supervised: list[bool] | None = None, line: int = 1) -> Example:
    return Example(ids, [True] * len(ids) if supervised is None else supervised, "rows.jsonl", line)


def rows(seed: int = 0, stem: int = 36) -> list[Example]:
    """A step of all that is hard: common beginnings of two levels that carry loss in some examples only, identical
    examples, prefixes of one another, one token, holes in the answer, answers that end with the pad token."""
    draw = random.Random(seed)

    def some(n: int) -> list[int]:
        return [draw.randint(3, VOCABULARY - 1) for _ in range(n)]

    first, second = some(stem), some(stem)
    made = [
        ([*first, *some(7), PAD], [False] * stem + [True] * 8),
        ([*first, *some(4), PAD], [True] * (stem + 5)),
        ([*first, *second, *some(3)], [k % 3 == 0 for k in range(stem)] + [False] * stem + [True] * 3),
        ([*first, *second, *some(9)], [False] * (2 * stem) + [True, False, True] * 3),
        (some(11), [False] * 5 + [True] * 6),
        (some(1), [True]),
    ]
    made.append((first, [True] * stem))  # the beginning of others
    made.append(made[2])  # identical
    made.append((made[3][0], [False] * (2 * stem) + [True] * 9))  # identical but for what carries loss
    made.append((some(40), [False] * 40))  # no loss at all
    return [example(ids, mask, i + 1) for i, (ids, mask) in enumerate(made)]


def one_by_one(model: Any, examples: list[Example]) -> Tensor:
    """The definition: every example alone, no padding, the sum over its supervised tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        logits = model(input_ids=torch.tensor([e.input_ids]), use_cache=False).logits[0]
        for t in range(1, len(e.input_ids)):
            if e.supervised[t]:
                total = total - logits[t - 1].to(total).log_softmax(-1)[e.input_ids[t]]
    return total


# ---- loss and gradients, three ways

Found = tuple[float, dict[str, Tensor]]


def alone(model: Any, examples: list[Example]) -> Found:
    loss = one_by_one(model, examples)
    loss.backward()
    return loss.item(), gradients(model)


def packed(model: Any, examples: list[Example], budget: int = 10**6, *, share: bool = True) -> Found:
    engine, total = Engine(model), 0.0
    rows = torch.zeros(len(examples), dtype=torch.float64)
    with engine.running():
        for p in packs(examples, budget, share=share):
            result = engine.forward(model, p)
            result.loss.backward()
            total += result.loss.item()
            rows[list(p.members)] = result.rows.double()
    assert total == pytest.approx(float(rows.sum()), rel=1e-5)
    return total, gradients(model)


def padded(model: Any, examples: list[Example], pad: int) -> Found:
    losses = row_losses(model, collate(examples, pad), sparse=True)
    losses.sum().backward()
    return losses.sum().item(), gradients(model)


def same(found: Found, wanted: Found, tolerance: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, g in wanted[1].items():
        largest = g.abs().max()
        assert largest > 0, name
        assert (found[1][name] - g).abs().max() <= tolerance * largest, name

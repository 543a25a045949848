"""The loss of supervised fine-tuning: minus the log likelihood of the supervised tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from trimtab.engine.rope import alone

IGNORE = -100


def row_losses(model: nn.Module, batch: dict[str, Any], *, sparse: bool) -> Tensor:
    """The summed loss of each row, float32 `(B,)`: its supervised tokens, each predicted from all before it.

    `sparse`: the model makes logits only at positions that some row asks for (see `takes_positions`).
    """
    labels = batch["labels"]  # (B, T)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    mask = inputs.get("attention_mask", torch.ones_like(labels))
    alone(getattr(getattr(model, "module", model), "config", None), (int(m.sum()) for m in mask), len(labels))
    wanted = labels[:, 1:] != IGNORE  # (B, T - 1): position t predicts token t + 1
    rows, columns = wanted.nonzero(as_tuple=True)
    # prompt methods that put virtual tokens in front shift `logits_to_keep` themselves, and return logits for those too
    if sparse and len(rows):
        kept, columns = columns.unique(return_inverse=True)
        logits = model(**inputs, logits_to_keep=kept).logits  # (B, K, V)
    else:
        logits = model(**inputs).logits[:, -labels.shape[1] :]  # (B, T, V)
    loss = F.cross_entropy(logits[rows, columns].float(), labels[:, 1:][wanted], reduction="none")
    return loss.new_zeros(len(labels)).index_add(0, rows, loss)


def predicts_next(model: Any) -> bool:
    """Whether a model's loss is that of the next token: by the loss that transformers names for it, or tried on a row of a
    model that it has no name for, as GPT-2."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    named = getattr(model, "loss_type", None)
    if named is not None or getattr(model, "get_output_embeddings", lambda: None)() is None:
        return LOSS_MAPPING.get(named or "") is ForCausalLMLoss
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(input_ids=ids, labels=ids)
        return bool(torch.isclose(out.loss, F.cross_entropy(out.logits[0, -8:-1].float(), ids[0, 1:]), rtol=1e-2))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(training)


def supervised(labels: Tensor) -> Tensor:
    """How many tokens of each row carry loss, `(B,)`. Nothing predicts the first token."""
    return (labels[:, 1:] != IGNORE).sum(1)


def takes_positions(forward: Any) -> bool:
    """Whether a model's forward makes logits at chosen positions alone."""
    return "logits_to_keep" in inspect.signature(forward).parameters

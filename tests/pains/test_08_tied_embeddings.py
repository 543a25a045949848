"""One matrix that is both ends of the model: tied it stays, or the merged model's config says that it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from situations import llama, logits, lora, move

from trimtab import PeftModel, get_peft_model

CASES: dict[str, dict[str, Any]] = {
    "adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapted head": {"target_modules": ["q_proj", "lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both whole, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize(("case", "tied"), [(c, t) for c in CASES for t in (True, False) if t or "kept tied" not in c])
def test_adapter_reloaded_and_merged_and_reloaded_are_the_trained_model(case: str, tied: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(tie_word_embeddings=tied), lora(**CASES[case]))
    move(model)
    want = logits(model)
    assert (want - logits(llama(tie_word_embeddings=tied))).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path / "merged")
    merged = type(plain).from_pretrained(tmp_path / "merged")
    assert (logits(merged) - want).abs().max() < 1e-5
    one = merged.lm_head.weight is merged.model.embed_tokens.weight
    equal = torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert one == merged.config.tie_word_embeddings == (tied and equal)

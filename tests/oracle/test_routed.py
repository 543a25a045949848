"""Methods that depend on the call, against peft: aLoRA, Arrow, X-LoRA, Poly, and mixed batches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import base, close, configs, exchange, inputs, move, quiet_peft
from torch import Tensor

import trimtab

IDS = inputs("llama")["input_ids"]
INVOCATION = IDS[0, 3:5].tolist()


def whole(model: Any, name: str) -> Tensor:
    """Logits of rows without padding, of which the first alone holds the invocation."""
    assert not (IDS[1].unfold(0, 2, 1) == torch.tensor(INVOCATION)).all(-1).any()
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("options", [{}, {"r": 4, "lora_alpha": 32, "use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_exchange_alora(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    exchange(model, *configs("alora", model, alora_invocation_tokens=INVOCATION, **options), tmp_path, answer=whole)


def test_generate_with_alora_is_peft_s_with_a_cache_and_without() -> None:
    ours, theirs = configs("alora", "llama", alora_invocation_tokens=INVOCATION, init_lora_weights=False, lora_alpha=64)
    us, them = trimtab.get_peft_model(base("llama"), ours).eval(), quiet_peft(base("llama"), theirs)
    move(them)
    trimtab.set_peft_model_state_dict(us, peft.get_peft_model_state_dict(them))
    options: dict[str, Any] = {"input_ids": IDS[:1], "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, drifts = them.generate(**options), them.generate(**options, use_cache=False)
    for found in (us.generate(**options), us.generate(**options, use_cache=False)):
        assert torch.equal(found.sequences, want.sequences)
        close(torch.stack(found.logits), torch.stack(want.logits), 2e-4)
    # peft counts from the end of a row, so without a cache each new token moves where the adapter begins
    assert (torch.stack(drifts.logits) - torch.stack(want.logits)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="Beam search"):
        them.generate(**options, num_beams=2)
    assert us.generate(**options, num_beams=2).sequences.shape == want.sequences.shape

"""What is broken off, by an error or by Ctrl-C, leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from small_llama import llama, logits, move

from trimtab import LoraConfig, get_peft_model
from trimtab.core.layer import AdapterLayer


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RuntimeError])
def test_a_merge_that_is_broken_off_is_taken_back(reason: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    move(model)
    before, merge, count = logits(model), AdapterLayer.merge, 0

    def third(self: AdapterLayer, *args: object, **options: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise reason
        merge(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(AdapterLayer, "merge", third)
    with pytest.raises(reason):
        model.merge_adapter()
    assert count == 3 and not any(m.merged_adapters for m in model.modules() if isinstance(m, AdapterLayer))
    assert torch.equal(logits(model), before)

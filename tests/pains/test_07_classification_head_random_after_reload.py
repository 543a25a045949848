"""The head of a classifier is made at random for each load: it is trained whole and saved, under whatever name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from situations import IDS, llama, lora, move
from torch import nn
from transformers import LlamaForSequenceClassification

from trimtab import PeftModel, get_peft_model
from trimtab.core.sites import layers


class Verdict(LlamaForSequenceClassification):
    """Its head is called as nobody would guess."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.verdict = self.score
        del self.score

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("verdict" if name == "score" and "verdict" in self._modules else name)


def classifier(cls: type, seed: int) -> Any:
    body = llama()
    torch.manual_seed(seed)
    made = cls(body.config)
    made.model.load_state_dict(body.model.state_dict())
    return made.eval()


@pytest.mark.parametrize(("cls", "head"), [(LlamaForSequenceClassification, "score"), (Verdict, "verdict")])
def test_it_comes_back(cls: type, head: str, tmp_path: Path) -> None:
    model = get_peft_model(classifier(cls, 1), lora(task_type="SEQ_CLS", target_modules="all-linear"))
    found: Any = dict(layers(model.get_base_model()))[head]
    assert [type(m) for m in found.modules()].count(nn.Linear) == 2  # the frozen head and its trained copy, no LoRA
    move(model)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(cls, 2), tmp_path)
    with torch.no_grad():
        want, got, base = (m(input_ids=IDS).logits for m in (model, again, classifier(cls, 2)))
    assert torch.equal(got, want) and (base - want).abs().max() > 1e-3

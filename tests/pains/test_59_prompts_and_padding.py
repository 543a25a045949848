"""No. 59: prompt methods generate for ragged batches what they generate for each row alone, and learn under checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from little import far
from situations import ran, write_model, write_rows
from small_llama import llama, move

from trimtab import get_peft_model
from trimtab.core.config import config_for
from trimtab.errors import ConfigError, NotSupported
from trimtab.model import checkpoint_activations

METHODS = ["prefix_tuning", "prompt_tuning", "p_tuning"]
ROWS = [[5, 9, 4, 7, 11], [8, 6], [3, 10, 12]]


def prompted(method: str) -> Any:
    model = get_peft_model(llama(), config_for(method, task_type="CAUSAL_LM", num_virtual_tokens=3))
    move(model, size=0.5)
    return model.eval()


def batch(side: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, ROWS))
    ids, mask = torch.zeros(len(ROWS), longest, dtype=torch.long), torch.zeros(len(ROWS), longest, dtype=torch.long)
    for i, row in enumerate(ROWS):
        at = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_ragged_batch_answers_as_single_rows(method: str, side: str) -> None:
    model, given = prompted(method), batch(side)
    with torch.no_grad():
        together = model(**given).logits[:, -given["input_ids"].shape[1] :]
        for i, row in enumerate(ROWS):
            alone = model(input_ids=torch.tensor([row])).logits[0, -len(row) :]
            assert far(together[i][given["attention_mask"][i] == 1], alone) < 1e-5
            assert far(alone, llama()(input_ids=torch.tensor([row])).logits[0]) > 1e-2
        if side == "left":
            wrote = model.generate(**given, max_new_tokens=4, do_sample=False)[:, -4:]
            for i, row in enumerate(ROWS):
                one = model.generate(input_ids=torch.tensor([row]), max_new_tokens=4, do_sample=False)[0, len(row) :]
                assert wrote[i, : len(one)].tolist() == one.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_gradient_or_is_refused(method: str) -> None:
    found = []
    for recompute in (False, True):
        model = prompted(method).train()
        ids = torch.tensor([ROWS[0]])
        if recompute:
            checkpoint_activations(model.get_base_model())
        if recompute and method == "prefix_tuning":
            with pytest.raises(NotSupported, match="drops the cache, and with it the prefix; turn it off"):
                model(input_ids=ids, labels=ids)
            return
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].abs().max() > 1e-4 and far(*found) < 1e-6


def test_a_run_refuses_it_before_the_model_is_read(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="drops the cache, and with it the prefix; turn it off"):
        ran(model, rows, tmp_path / "out", adapter="prefix_tuning", gradient_checkpointing=True,
            adapter_options={"num_virtual_tokens": 3})  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["prompt_tuning", "lora"])
def test_a_run_says_what_cannot_be_merged(tmp_path: Path, method: str) -> None:
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    options = {"num_virtual_tokens": 3} if method == "prompt_tuning" else {}
    said = ran(model, rows, tmp_path / "out", adapter=method, max_steps=1, adapter_options=options)[1]
    line = "PromptTuning is no change of a weight: it is used beside the model, and cannot be merged"
    assert (line in said) == (method == "prompt_tuning") and ("cannot be merged" in said) == (method == "prompt_tuning")

"""No socket is opened: adapters are made, saved, loaded and merged on a machine without a network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from situations import llama, logits, lora, move

from trimtab import PeftModel, get_peft_model


def test_a_whole_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = llama()
    base.name_or_path = base.config._name_or_path = "somebody/a-model"  # a hub id, as published adapters have it
    model = get_peft_model(base, lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    move(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), want) and (logits(again.merge_and_unload()) - want).abs().max() < 1e-5

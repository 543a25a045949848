"""No. 58: one seed, one start, whatever drew random numbers before; two runs are the same bytes."""

from __future__ import annotations

from pathlib import Path

import tiny_llama as tiny
import torch
from packed_runs import packed
from small_llama import llama

from trimtab import LoraConfig, get_peft_model, get_peft_model_state_dict


def test_the_start_does_not_depend_on_what_ran_before_nor_on_the_other_layers() -> None:
    def start(targets: list[str], before: int) -> torch.Tensor:
        model = llama()
        torch.manual_seed(7)
        torch.randn(before)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        return get_peft_model_state_dict(adapted)["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]

    one = start(["v_proj"], 0)
    assert one.abs().sum() > 0
    assert torch.equal(one, start(["v_proj"], 1000))
    assert torch.equal(one, start(["q_proj", "v_proj", "down_proj"], 5))


def test_two_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    ends = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(seed)
        model = tiny.adapted(lora_dropout=0.3)
        trainer = packed(tmp_path / name, tiny.rows(24), model, max_steps=3, seed=seed, train_sampling_strategy="random")
        trainer.train()
        ends.append((tiny.losses(trainer), torch.cat([p.detach().flatten() for p in tiny.tensors(model).values()])))
        torch.randn(len(ends))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])
    assert ends[0][0] != ends[2][0]

"""No. 58: one seed, one start, whatever drew random numbers before; two runs are the same bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from little import llama, options, said
from model_folder import write_model, write_rows

from trimtab import LoraConfig, get_peft_model


def test_the_start_does_not_depend_on_what_ran_before_nor_on_the_other_layers() -> None:
    def start(targets: list[str], before: int) -> torch.Tensor:
        model = llama()
        torch.manual_seed(7)
        torch.randn(before)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        return next(p.detach() for n, p in adapted.named_parameters() if "layers.1.self_attn.v_proj.lora_A" in n)

    one = start(["v_proj"], 0)
    assert one.abs().sum() > 0
    assert torch.equal(one, start(["v_proj"], 1000))
    assert torch.equal(one, start(["q_proj", "v_proj", "down_proj"], 5))


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    from trimtab.train.run import run

    folder, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.randn(len(written))
        said(run, options(folder, rows, tmp_path / name, seed=seed))
        written.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]

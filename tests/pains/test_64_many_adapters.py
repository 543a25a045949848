"""No. 64: the fortieth adapter loads as fast as the second, and a batch for many is right row by row."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from little import far
from small_llama import llama, logits, move

from trimtab import LoraConfig, PeftModel, get_peft_model


def test_the_time_to_load_does_not_grow_and_rows_go_their_own_way(tmp_path: Path) -> None:
    want = []
    for seed in range(3):
        model = get_peft_model(llama(), LoraConfig(r=2 + seed, target_modules=["q_proj", "v_proj"]))
        move(model, seed)
        want.append(logits(model.eval()))
        model.save_pretrained(tmp_path / str(seed))
    many = PeftModel.from_pretrained(llama(), tmp_path / "0", adapter_name="a0")
    times = []
    for i in range(1, 40):
        start = time.process_time()  # not of the clock: others may use the machine
        many.load_adapter(tmp_path / str(i % 3), f"a{i}")
        times.append(time.process_time() - start)
    assert min(times[-9:]) <= 2 * min(times[:9])
    ids = torch.tensor([[5, 9, 4, 7, 11], [3, 8, 6, 10, 12]])
    with torch.no_grad():
        both = many(input_ids=ids, adapter_names=["a37", "a38"]).logits
    assert far(both[0], want[37 % 3][0]) < 1e-5 and far(both[1], want[38 % 3][1]) < 1e-5
    assert far(want[1], want[2]) > 1e-2

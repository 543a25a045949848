"""No. 79: adapters of other ranks and scales take each other's place in a compiled model that is compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from little import far
from small_llama import IDS, llama, logits, move
from torch._dynamo.testing import CompileCounter

from trimtab import LoraConfig, PeftModel, get_peft_model, hotswap_adapter, prepare_model_for_compiled_hotswap


def test_four_adapters_one_compilation(tmp_path: Path) -> None:
    want = []
    for seed, (r, alpha) in enumerate([(2, 4), (4, 2), (3, 9), (1, 1)]):
        model = get_peft_model(llama(), LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
        move(model, seed)
        want.append(logits(model.eval()))
        model.save_pretrained(tmp_path / str(seed))
    served = PeftModel.from_pretrained(llama(), tmp_path / "0")
    prepare_model_for_compiled_hotswap(served, target_rank=4)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Any = torch.compile(served.get_base_model(), backend=counter)
    with torch.no_grad():
        compiled(input_ids=IDS)
        once = counter.frame_count
        for seed in (1, 2, 3, 0):
            hotswap_adapter(served, tmp_path / str(seed), "default")
            assert far(compiled(input_ids=IDS).logits, want[seed]) < 1e-5
    torch._dynamo.reset()
    assert once > 0 and counter.frame_count == once

"""Two processes give the losses, the evaluation and the adapter that one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_llama as tiny
import torch


def launched(folder: Path, layout: str) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("ranks.py")), str(folder), layout],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_two_ranks_equal_one(tmp_path: Path, layout: str) -> None:
    two = launched(tmp_path, layout)
    one = ranks.trainer(tmp_path / "one", micro=4, layout=layout)  # eight rows a step, as on two ranks with two of two
    one.train()
    assert two["losses"] == pytest.approx(tiny.losses(one), abs=1e-6)
    assert two["eval"] == pytest.approx(one.evaluate()["eval_loss"], abs=1e-6)
    assert two["tokens"] == one.counts.tokens
    if layout == "packed":
        alone = one.counts.tokens - one.counts.examples  # the last token of a row predicts nothing
        assert two["computed"] == alone, "rows with nothing in common, and no padding"
    for name, tensor in tiny.tensors(one.model).items():
        assert torch.allclose(torch.tensor(two["tensors"][name]), tensor, atol=2e-5), name

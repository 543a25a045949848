"""The work of a training step, counted, to compare with what the chip could do.

    FLOPs of a computed token = 4 P + 4 H s

P: weights of the linear layers, 2 FLOPs each forward and 2 for the gradient towards the input; frozen, they have no gradient
of their own. H = hidden x vocabulary: the head, of use at supervised positions alone; s: their share of the computed
tokens. Attention scores, the adapter's own products and everything element-wise are left out, so the share of the matmul
peak that follows from it is a little too low.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def sizes(model: Path) -> dict[str, int]:
    """P and H of a model folder, from the shapes of its stored tensors."""
    from safetensors import safe_open

    linear = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and "embed" not in name and "lm_head" not in name:
                    linear += shape[0] * shape[1]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {"linear": linear, "head": config["hidden_size"] * config["vocab_size"]}


def share_of_peak(cell: dict[str, Any], model: dict[str, int]) -> float | None:
    """The FLOP/s of a run over the machine's; once compiled, where that is known. None where a run reports too little."""
    if "tokens_computed" not in cell or not cell.get("matmul_peak"):
        return None
    supervised = cell["supervised_tokens"] / cell["tokens_computed"]
    each = 4 * model["linear"] + 4 * model["head"] * supervised
    speed = cell.get("steady_tokens_per_second") or cell["tokens_per_second"]
    return each * speed * cell["tokens_computed"] / cell["tokens"] / cell["matmul_peak"]

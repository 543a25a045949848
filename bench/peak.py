"""The matmul rate of this machine at the shapes of a model: python peak.py MODEL THREADS DTYPE. Prints one JSON line.

Shapes (tokens x in x out): tokens x hidden x intermediate, and back. The best of the two counts, each by its median time; for
bfloat16 the best of it and of float32, in which a chip that has no bfloat16 products computes them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

SECONDS = 0.5  # for each shape


def rate(tokens: int, fan_in: int, fan_out: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one product, 2 x tokens x in x out over its median time."""
    x = torch.randn(tokens, fan_in, dtype=dtype, device=device)
    w = torch.randn(fan_out, fan_in, dtype=dtype, device=device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 10 or time.perf_counter() - started < SECONDS:
        begin = time.perf_counter()
        torch.nn.functional.linear(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * tokens * fan_in * fan_out / statistics.median(times)


if __name__ == "__main__":
    config = json.loads((Path(sys.argv[1]) / "config.json").read_text(encoding="utf-8"))
    torch.set_num_threads(int(sys.argv[2]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = 16384 if device == "cuda" else 1024
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    dtypes = {torch.float32, getattr(torch, sys.argv[3])}
    rates = [rate(tokens, *shape, device, d) for shape in ((hidden, wide), (wide, hidden)) for d in dtypes]
    card = torch.cuda.get_device_name() if device == "cuda" else None
    print(json.dumps({"matmul_peak": max(rates), "card": card}))

"""Run a peer's script as it is: python peer.py SCRIPT ARGUMENTS. The scripts report the memory of their process; where
they train on a graphics card, a second line adds the memory of the card, which is what our `run.json` reports there."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # the scripts import each other
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        print(json.dumps({"cuda_peak_memory_bytes": torch.cuda.max_memory_allocated()}))

"""The tiny models and rows are those of the tests of training and of the model surface."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("train", "model"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

"""The oracle is peft 0.21.2; without it there is nothing to compare with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
torch.set_num_threads(1)

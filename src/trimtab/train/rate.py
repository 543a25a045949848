"""The learning rate where none is given."""

from __future__ import annotations

from typing import Any

# QLoRA (arXiv:2305.14314, table 9) trained its 7B and 13B models, 4,096 and 5,120 wide, at 2e-4, those twice as wide at 1e-4.
RATE, WIDTH = 2e-4, 4096
HIGHEST = 2e-3


def learning_rate(config: Any) -> float:
    """2e-4 for a model 4,096 wide, and in inverse proportion to the width; at most 2e-3, two digits.

    Under Adam a weight moves by the rate, whatever its gradient, so an output moves with the number of its inputs: the rate
    that suits hidden layers falls as 1 / width (arXiv:2203.03466, table 8).
    """
    width = getattr(config.get_text_config(), "hidden_size", None) or WIDTH
    return float(f"{min(HIGHEST, RATE * WIDTH / width):.1e}")

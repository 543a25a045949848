"""LoRA's start with normal instead of uniform numbers."""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.inits._start import init
from trimtab.inits.kaiming import Kaiming


@init
class Gaussian(Kaiming):
    """A ~ N(0, 1 / r^2), B = 0; on an embedding as `True`                                          arXiv:2106.09685"""

    def draw(self, A: Tensor, site: Site) -> None:
        nn.init.normal_(A, std=1 / A.shape[0], generator=site.generator("lora_A"))

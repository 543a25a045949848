"""The start of LoRA as published: one factor random, the other 0."""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.inits._start import Init, init


@init
class Kaiming(Init):
    """A ~ U(-1 / sqrt(in), 1 / sqrt(in)), B = 0: `init_lora_weights=True`                          arXiv:2106.09685

    On an embedding A is looked up, so it is the one that starts at 0, and B ~ N(0, 1).
    """

    kinds = ("linear", "embedding", "conv")

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        if site.kind == "embedding":
            nn.init.normal_(B, generator=site.generator("lora_B"))
        else:
            self.draw(A, site)

    def draw(self, A: Tensor, site: Site) -> None:
        nn.init.kaiming_uniform_(A, a=5**0.5, generator=site.generator("lora_A"))

"""Both factors random, so that an adapter does something before it is trained: for tests and experiments."""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.core.adapter import Site
from trimtab.inits._start import Init, init


@init
class Uniform(Init):
    """A ~ U(-1 / sqrt(in), 1 / sqrt(in)), B ~ U(-1 / sqrt(r), 1 / sqrt(r)): `init_lora_weights=False`"""

    kinds = ("linear", "embedding", "conv")

    def fill(self, A: Tensor, B: Tensor, site: Site, s: float) -> None:
        nn.init.kaiming_uniform_(A, a=5**0.5, generator=site.generator("lora_A"))
        nn.init.kaiming_uniform_(B, a=5**0.5, generator=site.generator("lora_B"))

"""What LoRA's variants share: a LoRA whose factors are formed in another way."""

from __future__ import annotations

from torch import Tensor

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.errors import NotSupported
from trimtab.methods.lora import LoRA, LoraConfig


class Variant(Adapter):
    """W' = W + s B' A'. Abstract: `factors` forms A' and B' from what is trained; `forward` only to be faster."""

    additive = True

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__()
        self.lora = LoRA(cfg, site)
        self.names = {f"lora.{own}": name for own, name in self.lora.names.items()} | {"lora.": ""}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A' (r, in, *kernel) and B' (out, r / groups)."""
        return self.lora.factors()

    def restart(self, cfg: LoraConfig, site: Site) -> None:
        """Start again, where a factor has been given another shape."""
        if cfg.init_lora_weights not in (True, False, "gaussian"):
            raise NotSupported(f"init_lora_weights={cfg.init_lora_weights!r} cannot start the factors at {site.name!r}")
        self.lora.begin(cfg, site)

    def weight(self, w: Tensor) -> Tensor:
        return self.lora.moved(w, *self.factors())

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        return self.lora.bias(b, w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        A, B = self.factors()
        return self.lora.plus(base(x), base.op(self.lora.drop(x), A), base, B)

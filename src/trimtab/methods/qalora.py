"""QA-LoRA: A reads the mean of each group of inputs, so that a base with one zero point a group can take the product in."""

from __future__ import annotations

from torch import Tensor

from trimtab.core.adapter import Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import method
from trimtab.errors import NotSupported
from trimtab.methods._variant import Variant
from trimtab.methods.lora import LoraConfig


@method("LORA", config=LoraConfig, small={"r": 4, "qalora_group_size": 4}, switch="use_qalora")
class QALoRA(Variant):
    """W' = W + s n B A M                                                                         arXiv:2309.14717, alg. 1

    M (n, in) takes the means of n = in / g groups of g = qalora_group_size inputs that follow one another; A (r, n).
    """

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        site.need("QA-LoRA", "linear")
        super().__init__(cfg, site)
        self.g = cfg.qalora_group_size
        self.n, rest = divmod(site.shape[1], self.g)
        if rest:
            raise NotSupported(f"QA-LoRA on {site.name!r}: qalora_group_size={self.g} does not divide {site.shape[1]} inputs")
        self.lora.lora_A = Factor(len(self.lora.lora_A.weight), self.n)
        self.restart(cfg, site)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return (self.n / self.g) * A.repeat_interleave(self.g, dim=1), B

    def forward(self, x: Tensor, base: Base) -> Tensor:  # the means first: A then reads, and its gradient keeps, n numbers
        A, B = super().factors()
        means = self.lora.drop(x).unflatten(-1, (self.n, self.g)).mean(-1)
        return self.lora.plus(base(x), base.op(self.n * means, A), base, B)

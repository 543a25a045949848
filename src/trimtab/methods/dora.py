"""DoRA: the length of each weight row is trained apart from its direction, which a LoRA moves."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.adapter import Adapter, Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import method
from trimtab.core.ops import along
from trimtab.methods.lora import LoRA, LoraConfig

ROWS = 1024  # of a weight in 16 bits that are raised at once
KEPT = 0.05  # |V|^2 / (|W|^2 + |s B A|^2) from which the factored sum is right to 1e-5 in float32


@method("LORA", config=LoraConfig, small={"r": 4}, switch="use_dora")
class DoRA(Adapter):
    """W' = m V / |V|,  V = W + s B A                                                          arXiv:2402.09353, eq. 5

    |V| (out): the norm of each output row, a constant for the gradient (section 4.3). m (out) starts at |V|, so W' = W.
    """

    pack, unpack, filed = LoRA.pack, LoRA.unpack, LoRA.filed

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__()
        self.lora = LoRA(cfg, site)
        self.lora_magnitude_vector = Factor(
            *([1] if site.kind == "conv" else []), site.shape[0], *[1] * (len(site.shape) - 2)
        )
        w = site.base.weight().detach()
        if not w.is_meta:  # a model that is a shape without weights: `trimtab sites`
            self.lora_magnitude_vector.weight.data.copy_(self._norm(w.float().cpu()).view_as(self.m))
        self.names = {f"lora.{own}": name for own, name in self.lora.names.items()}
        self.names |= {"lora.": "", "lora_magnitude_vector.weight": "lora_magnitude_vector"}

    @property
    def m(self) -> Tensor:
        return self.lora_magnitude_vector.weight  # (out), of a convolution (1, out, 1, ...)

    def _norm(self, w: Tensor) -> Tensor:
        return self.lora.weight(w).detach().flatten(1).norm(dim=1)  # (out)

    @torch.no_grad()
    def _factored(self, w: Tensor) -> Tensor:
        """The same from |V|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>, row by row: B A (out, in) is not made. Where rows
        of W and s B A all but cancel, the sum has lost its digits. A compiler fuses the plain form, and has no use for this."""
        A, B = self.lora.factors()
        if torch.compiler.is_compiling() or A.dtype.itemsize < 4:
            return self._norm(w)
        A, B = A.flatten(1), self.lora.s * self.lora.op.full(B)
        parts = zip(w.flatten(1).split(ROWS), B.split(ROWS), strict=True)
        both = torch.cat([(A @ part.to(A.dtype).T).T.mul(b).sum(1) for part, b in parts])  # <W, s B A>
        own = torch.linalg.vector_norm(w.flatten(1), dim=1, dtype=A.dtype).square()
        added = (B @ (A @ A.T)).mul(B).sum(1)
        square = own + 2 * both + added
        return self._norm(w) if bool((square < KEPT * (own + added)).any()) else square.sqrt()

    def weight(self, w: Tensor) -> Tensor:
        v = self.lora.weight(w)
        return v * along(self.m.flatten() / self._norm(w), v, 0)

    def forward(self, x: Tensor, base: Base) -> Tensor:  # W' x + b = (V x) m / |V| + b
        scale = base.op.out(self.m.flatten() / self._factored(base.weight()))
        y, b = self.lora(x, base), base.bias()
        return y * scale if b is None else (y - base.op.out(b)) * scale + base.op.out(b)

"""OSF: the weight's strongest singular directions stay, the rest is trained, and gradients keep out of what stays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Targets, method, option
from trimtab.errors import NotSupported

_LLAMAS = "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi"
_TYPES = {
    _LLAMAS: "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj",
    "gpt2 gpt_bigcode": "c_attn c_proj",
    "bloom gpt_neox falcon": "query_key_value dense_4h_to_h",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "gptj": "q_proj k_proj v_proj out_proj fc_in fc_out",
}


@dataclass(kw_only=True)
class OSFConfig(Targets):
    effective_rank: int | float | None = option(
        None, "directions that stay, or their share (a float up to 1); none: half"
    )
    rank_pattern: dict[str, int | float] | None = option(None, "effective_rank by layer name or regex")
    init_weights: bool | None = option(True, "true: start as the base; false: random")
    target_svd_config: dict[str, int] | None = option(None, "kept for the file format; no effect")


class Projected(torch.autograd.Function):
    """The tensor itself. Of its gradient, what lies in the span of `basis` (`inside`), or what does not."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, basis: Tensor, inside: bool) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.inside = inside
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (Q,), g = ctx.saved_tensors, grads[0]
        within = Q @ (Q.T @ g)
        return within if ctx.inside else g - within, None, None


@method("OSF", config=OSFConfig)
class OSF(Adapter):
    """W' = W + U diag(S) V - U0 diag(S0) V0                                                           arXiv:2504.07097

    U0 (out, m - k), S0, V0 (m - k, in): the weakest singular triples of the frozen W, where U, S and V start; m = min(in,
    out), k = effective_rank. The gradients of U and V are projected off the k strongest directions. They are found again
    from the base when an adapter is loaded.
    """

    additive = True
    targets = {kind: names.split() for kinds, names in _TYPES.items() for kind in kinds.split()}
    U0: Tensor
    S0: Tensor
    V0: Tensor
    U_basis: Tensor
    V_basis: Tensor

    def __init__(self, cfg: OSFConfig, site: Site) -> None:
        super().__init__()
        site.need("OSF", "linear", "embedding", "conv")
        w = site.base.weight().detach().flatten(1)
        (out, inn), m = w.shape, min(w.shape)
        patterns = (rank for pattern, rank in (cfg.rank_pattern or {}).items() if re.search(pattern, site.name))
        rank = next(patterns, cfg.effective_rank)
        k = m // 2 if rank is None else int(m * rank) if isinstance(rank, float) and 0 < rank <= 1 else int(rank)
        if not 0 < k < m:
            raise NotSupported(
                f"OSF on {site.name!r}: effective_rank={rank} of its {m} directions: some stay, some are trained"
            )
        U, S, V = (t.to(w.dtype) for t in torch.linalg.svd(w.float(), full_matrices=False))
        start = {"U_low": U[:, k:].contiguous(), "S_low": S[k:].contiguous(), "V_low": V[k:].contiguous()}
        for name, value in zip(("U0", "S0", "V0"), start.values(), strict=True):
            self.register_buffer(name, value, persistent=False)
        self.inside = out <= inn, inn <= out  # U, V square: their high and low parts span everything, and one is enough
        self.register_buffer("U_basis", start["U_low"] if self.inside[0] else U[:, :k].contiguous(), persistent=False)
        self.register_buffer("V_basis", (start["V_low"] if self.inside[1] else V[:k]).T.contiguous(), persistent=False)
        if cfg.init_weights is False:
            start = {n: torch.randn(v.shape, generator=site.generator(n)) for n, v in start.items()}
        self.osf_svd_params = nn.ParameterDict({n: nn.Parameter(v.clone()) for n, v in start.items()})

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, 2 (m - k)) and (2 (m - k), in)."""
        U = Projected.apply(self.osf_svd_params["U_low"], self.U_basis, self.inside[0])
        V = Projected.apply(self.osf_svd_params["V_low"].T, self.V_basis, self.inside[1])
        return torch.cat([U * self.osf_svd_params["S_low"], -self.U0 * self.S0], 1), torch.cat([V.T, self.V0])

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.factors()
        return w + (A @ B).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.op.groups > 1:
            return super().forward(x, base)
        A, B = self.factors()
        return base(x) + base.op.mix(base.op(x, B.view(-1, *base.shape[1:])), A)

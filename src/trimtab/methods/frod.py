"""FRoD: a weight in a basis that layers of one role share, where its diagonal and a few other entries are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, Tensors
from trimtab.core.base import Base, port
from trimtab.core.config import Biases, FanIn, Layers, Targets, in_range, method, option
from trimtab.core.sites import frozen
from trimtab.methods._basis import Shared, coordinates, role
from trimtab.methods._low_rank import dropout, mix, weight_of
from trimtab.targets import TARGETS

if TYPE_CHECKING:
    from trimtab.core.group import Group


@dataclass(kw_only=True)
class FrodConfig(Targets, Layers, Biases, FanIn):
    projection_prng_key: int = option(0, "seed of which entries of S are trained")
    save_projection: bool = option(True, "write the shared basis into the adapter file")
    frod_dropout: float = option(0.0, "dropout on the input of the update")
    init_weights: bool = option(True, "true: no change at the start; false: random")
    sparse_rate: float = option(0.01, "share of the entries off the diagonal that are trained")
    regularization_alpha: float = option(0.001, "ridge in the search for the basis")
    progressbar: bool = option(True, "kept for the file format; no bar is shown")
    runtime_offload_base_weight: bool = option(False, "kept for the file format; the base stays where it is")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("sparse_rate", self.sparse_rate, 0, 1)
        in_range("frod_dropout", self.frod_dropout, 0, 1)


@method("FROD", config=FrodConfig, small={"sparse_rate": 0.1})
class FRoD(Adapter):
    """W' = W + U (S + diag(l - l_0)) V^T  for  W = U diag(l_0) V^T

    doi.org/10.1609/aaai.v40i31.39813. V (in, in) is shared by all layers of a role, found from their weights and saved;
    U (out, in) and l_0 (in) follow from W and V. Trained are l (in), from l_0, and the entries of S at a few random places off
    the diagonal, from 0.
    """

    additive = True
    targets = TARGETS | {"phi": ["q_proj", "v_proj"], "vit": ["query", "value"]}
    frod_U: Tensor
    start: Tensor

    def __init__(self, cfg: FrodConfig, site: Site) -> None:
        super().__init__()
        self.shared: Any = site.shared
        self.role, self.drop, w = role(site.name), dropout(cfg.frod_dropout, site), weight_of(site).flatten(1)
        U, l = coordinates(w, self.tables()[0])
        self.register_buffer("frod_U", U, persistent=False)
        self.register_buffer("start", l, persistent=False)
        self.frod_lambda_l = nn.Parameter(l.clone())
        count = self.tables()[1].shape[1]
        self.frod_lambda_s_values = nn.Parameter(torch.zeros(count)) if count else None
        if not cfg.init_weights:
            if self.frod_lambda_s_values is not None:
                nn.init.normal_(self.frod_lambda_s_values, std=0.1, generator=site.generator("frod_lambda_s_values"))
            self.frod_lambda_l.data += 0.1 * torch.randn(l.shape, generator=site.generator("frod_lambda_l")).to(l)

    @classmethod
    def share(cls, cfg: FrodConfig, sites: Sequence[Site]) -> nn.Module:
        for site in sites:  # not embeddings, whose V would be vocabulary x vocabulary
            site.need("FRoD", "linear", "conv")
        return Shared(cfg, sites)

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.shared.frod_V._buffers[self.role], self.shared.frod_s_indices._buffers[self.role]

    def core(self) -> tuple[Tensor, Tensor]:
        """S + diag(l - l_0) and V, (in, in)."""
        V, where = self.tables()
        S = torch.diag(self.frod_lambda_l - self.start)
        return (S if self.frod_lambda_s_values is None else S.index_put((*where,), self.frod_lambda_s_values)), V

    def weight(self, w: Tensor) -> Tensor:
        S, V = self.core()
        return w + (self.frod_U @ S @ V.T).view_as(w)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        S, V = self.core()
        h = base.op(self.drop(x), V.T.reshape(-1, *base.shape[1:]))
        return base(x) + mix(mix(h, base, S), base, self.frod_U)

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        """U and l_0 again, for the V that the file holds."""
        tensors = {key: t for key, t in tensors.items() if t.numel() or key[1] != "frod_lambda_s_values"}
        if {(path, name) for path, name, _ in group.tensors()} == tensors.keys():
            for path, own in group.each(cls):
                V = tensors.get(("", f"frod_V.{own.role}"))
                if V is not None and V.shape == own.tables()[0].shape:
                    site = Site(path, port(frozen(group.layers[path])))
                    U, l = coordinates(weight_of(site).flatten(1), V)
                    own.frod_U.copy_(U)
                    own.start.copy_(l)
        return tensors

"""AdaMSS: the rows of a weight in clusters, each with a small low-rank update inside the weight's own row space."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site, Tensors
from trimtab.core.base import Base
from trimtab.core.config import Layers, Targets, in_range, method, one_of, option
from trimtab.core.group import Group
from trimtab.errors import ConfigError, TrimtabWarning
from trimtab.methods._budget import observe, track
from trimtab.methods._clusters import resize, retire, subspaces
from trimtab.methods._low_rank import mix, weight_of
from trimtab.targets import TARGETS


@dataclass(kw_only=True)
class AdamssConfig(Targets, Layers):
    r: int = option(100, "dimension of the weight's row space that is used")
    num_subspaces: int = option(5, "clusters of rows")
    subspace_rank: int = option(1, "rank of the update of a cluster")
    init_weights: str | None = option("orthogonal", "orthogonal: no change at the start; none: B random")
    use_asa: bool = option(False, "train fewer and fewer clusters, those that matter most")
    asa_target_subspaces: int = option(50, "how many clusters of the whole model are trained in the end")
    init_warmup: int = option(50, "the step from which clusters are taken out")
    final_warmup: int = option(1000, "the last such step")
    mask_interval: int = option(100, "clusters are taken out every so many steps")
    asa_importance_beta: float = option(0.85, "smoothing of the importance")
    asa_uncertainty_beta: float = option(0.85, "smoothing of its uncertainty")
    asa_schedule_exponent: float = option(3.0, "how fast the number falls")
    use_dynamic_rank: bool = option(False, "less rank where a cluster's singular values fall fast")
    svd_threshold: float = option(0.1, "with that: those below this share of the largest do not count")
    random_seed: int = option(0, "seed of the singular value decomposition")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = one_of("init_weights", self.init_weights or None, ["orthogonal", None])
        for name in ("r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "mask_interval"):
            in_range(name, getattr(self, name), 1)
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ConfigError(f"init_warmup={self.init_warmup} must be below final_warmup={self.final_warmup}")


@method("ADAMSS", config=AdamssConfig, small={"r": 6, "num_subspaces": 3})
class AdaMSS(Adapter):
    """[W' b'] = [W b] + C N,  rows of C in cluster i = B_i A_i

    openreview.net/forum?id=8ZdWmpYxT0. N (R, in + 1): the first right singular vectors of [W b], R = min(r, sides); the rows
    of the left ones are clustered. A_i (r_i, R): the right singular vectors of those of cluster i; B_i (rows, r_i) starts at 0.
    `use_asa`: clusters that matter least are trained no more. adamss_rows says which row is where; published files lack it.
    """

    additive, targets = True, TARGETS | {"vit": ["query", "value"]}

    def __init__(self, cfg: AdamssConfig, site: Site) -> None:
        super().__init__()
        site.need("AdaMSS", "linear", "embedding", "conv")
        self.asa, self.starts_at_base, b = cfg.use_asa, cfg.init_weights is not None, site.base.bias()
        w = weight_of(site).flatten(1)
        self.inn, w = w.shape[1], w if b is None else torch.cat([w, b.detach()[:, None].to(w)], dim=1)
        N, rows, A = subspaces(w.float().cpu(), cfg)
        self.adamss_A = nn.ParameterList(A)
        self.adamss_B = nn.ParameterList(torch.zeros(int((rows == i).sum()), len(a)) for i, a in enumerate(A))
        for i, tensor in enumerate(self.adamss_B if not self.starts_at_base else ()):
            nn.init.normal_(tensor, std=0.01, generator=site.generator(f"adamss_B.{i}"))
        for name, tensor in {"adamss_newB": N, "adamss_rows": rows, "on": torch.ones(len(A)).bool()}.items():
            self.register_buffer(name, tensor, persistent=name != "on")
        self.remembers = ("on", *track(self)) if cfg.use_asa and not cfg.inference_mode else ()

    def factors(self: Any) -> tuple[Tensor, Tensor]:
        """N (R, in + 1) and C (out, R). What is trained no more is a constant, so that no optimizer moves it."""
        own: Any = self
        on = own.on.tolist() if self.asa and torch.is_grad_enabled() else [True] * len(own.on)
        parts = (B @ A if live else (B @ A).detach() for A, B, live in zip(self.adamss_A, self.adamss_B, on, strict=True))
        return own.adamss_newB, torch.cat([*parts])[own.adamss_rows.argsort(stable=True).argsort()]

    def weight(self, w: Tensor) -> Tensor:
        N, C = self.factors()
        return w + (C @ N[:, : self.inn]).view_as(w)

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        N, C = self.factors()
        return b if b is None or N.shape[1] == self.inn else b + C @ N[:, -1]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        N, C = self.factors()
        shift = None if N.shape[1] == self.inn else N[:, -1]
        return base(x) + mix(base.op(x, N[:, : self.inn].reshape(-1, *base.shape[1:]), shift), base, C)

    @classmethod
    @torch.no_grad()
    def step(cls, group: Group, step: int) -> None:
        cfg: Any = group.config
        parts = [a for _, a in group.each(cls) if a.remembers and a.adamss_A[0].requires_grad]
        if not parts or not cfg.init_warmup <= step <= cfg.final_warmup:
            return
        for part in parts:
            live = {n: p for n, p in part.named_parameters() if part.on[int(n.rpartition(".")[2])]}
            observe(part, live, cfg.asa_importance_beta, cfg.asa_uncertainty_beta, first="spread")
        if step % cfg.mask_interval == 0:
            least, left = cfg.asa_target_subspaces, (cfg.final_warmup - step) / (cfg.final_warmup - cfg.init_warmup)
            retire(parts, int(least + (sum(len(p.on) for p in parts) - least) * left**cfg.asa_schedule_exponent))

    @classmethod
    def unpack(cls, group: Group, tensors: Tensors) -> Tensors:
        for path, own in group.each(cls):
            if (path, "adamss_rows") in tensors:
                resize(own, {name: t.shape for (at, name), t in tensors.items() if at == path})
            else:
                tensors[path, "adamss_rows"] = own.adamss_rows
                warnings.warn(f"{path}: the file does not say which rows are in which cluster; clustered again", TrimtabWarning)
        return tensors

"""Trainable tokens: the embeddings of a few tokens are trained, and with them the same rows of a tied output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import PeftConfig, method, option
from trimtab.errors import ConfigError
from trimtab.methods._tied import input_embedding, tied_to


@dataclass(kw_only=True)
class TrainableTokensConfig(PeftConfig):
    token_indices: list[int] = option(list, "ids of the tokens that are trained", place="trainable_tokens")
    target_modules: list[str] | str | None = option(None, "names of embeddings, or a regex; none: the input embedding")
    init_weights: bool = option(True, "true: start as the base; false: random")


@method("TRAINABLE_TOKENS", config=TrainableTokensConfig, small={"token_indices": [5, 1]})
class TrainableTokens(Adapter):
    """W'[token] = t + (W[token] - t0)  for the tokens of a list                                       no paper

    t (tokens, dim) is trained, starts at the frozen rows t0 of the base and is saved as it is, so that W'[token] = t on any
    base; what other adapters add to W[token] stays added. The rows stand along the inputs of an embedding
    and along the outputs of a linear layer. Layers whose weight is tied to the embedding's follow it.
    """

    additive = True
    targets = {}
    ids: Tensor
    slots: Tensor
    original: Tensor

    def __init__(self, cfg: TrainableTokensConfig, site: Site) -> None:
        super().__init__()
        site.need("trainable tokens", "embedding", "linear")
        self.along, ids = (1 if site.kind == "embedding" else 0), cfg.token_indices
        n = site.shape[self.along]
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= n:
            raise ConfigError(f"token_indices={ids!r}: ids below {n}, each once, for {site.name!r} has that many rows")
        slots = torch.zeros(n, dtype=torch.int32)
        slots[ids] = torch.arange(1, len(ids) + 1, dtype=torch.int32)
        rows = site.base.weight().detach().index_select(self.along, torch.tensor(ids, device=site.base.device))
        rows = rows.T if self.along else rows  # (tokens, dim)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.register_buffer("slots", slots, persistent=False)  # where a token's row is, from 1; 0: it has none
        self.register_buffer("original", rows.clone(), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(rows.clone())
        if not cfg.init_weights:
            nn.init.normal_(self.trainable_tokens_delta, generator=site.generator("trainable_tokens_delta"))

    @classmethod
    def aim(cls, model: nn.Module) -> str:
        found = input_embedding(model)
        return "embed_tokens" if found is None else found.name

    def raised(self, w: Tensor, along: int) -> Tensor:
        ids, t, t0 = self.ids.to(w.device), self.trainable_tokens_delta.to(w.device), self.original.to(w.device)
        w = w.to(t.dtype)
        rows = w.index_select(along, ids)
        return w.index_copy(along, ids, (t.T + (rows - t0.T)) if along else (t + (rows - t0)))

    def applied(self, x: Tensor, base: Base, along: int) -> Tensor:
        """What the base answers with the rows so raised, without a copy of all the others."""
        t, t0 = self.trainable_tokens_delta.to(x.device), self.original.to(x.device)
        if not along:
            own = x.to(t.dtype) @ (t - t0).T  # under autocast in another dtype than either
            return base(x).to(own.dtype).index_add(-1, self.ids.to(x.device), own)
        if type(base.op.layer).forward is not nn.Embedding.forward:  # scaled, as Gemma's
            return base.op(x, self.raised(base.weight(), along))
        slot = self.slots.to(x.device)[x]
        pad = lambda rows: nn.functional.embedding(slot, nn.functional.pad(rows, (0, 0, 1, 0)))  # noqa: E731
        return pad(t) + (base(x) - pad(t0))

    def weight(self, w: Tensor) -> Tensor:
        return self.raised(w, self.along)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.applied(x, base, self.along)


class TiedTokens(Adapter):
    """The rows of an embedding's adapter, at a layer whose weight is tied to the embedding's. `named`: the file names them
    once more here."""

    additive = True

    def __init__(self, rows: TrainableTokens, site: Site, *, named: bool = False) -> None:
        super().__init__()
        if named:
            self.trainable_tokens_delta = rows.trainable_tokens_delta
        self.rows, self.along = [rows], (1 if site.kind == "embedding" else 0)  # in a list, so that it is no submodule

    def weight(self, w: Tensor) -> Tensor:
        return self.rows[0].raised(w, self.along)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.rows[0].applied(x, base, self.along)


def extend(cfg: Any, model: nn.Module, group: Any, plan: dict[str, list[tuple[Site, Adapter]]]) -> None:
    """Layers that are tied to an embedding with trained tokens follow it."""
    for site, rows in [part for parts in plan.values() for part in parts]:
        if isinstance(rows, TrainableTokens) and site.kind == "embedding":
            for tied in tied_to(site, model):
                others = [part for part in plan.get(tied.name, []) if not isinstance(part[1], TrainableTokens)]
                plan[tied.name] = [*others, (tied, TiedTokens(rows, tied, named=True))]

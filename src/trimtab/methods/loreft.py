"""LoReFT: hidden states are edited in a low-rank subspace, at the first and last tokens of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.call import Call
from trimtab.core.adapter import Adapted, Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Targets, in_range, method, one_of, option
from trimtab.core.group import Group
from trimtab.errors import ConfigError, NotMergeable, NotSupported
from trimtab.methods._blocks import NON_LINEAR, places, width
from trimtab.methods._edits import Edit, ends


@dataclass(kw_only=True)
class LoReftConfig(Targets):
    r: int = option(1, "rank of the subspace")
    layers: list[int] | str = option("all", "without target_modules: numbers of the layers, or all")
    prefix_positions: int = option(3, "how many tokens at the front")
    suffix_positions: int = option(0, "how many at the end of the prompt")
    tied_weights: bool = option(False, "one edit for both ends")
    orthogonality: bool = option(True, "rows of the projection are orthonormal; false: NoReFT")
    subtract_projection: bool = option(True, "false, without orthogonality: DiReFT")
    non_linearity: str | None = option(None, f"of the source: none, or one of {', '.join(NON_LINEAR)}", choices=["tanh"])
    dropout: float = option(0.05, "dropout of the edited states")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("dropout", self.dropout, 0, 1)
        one_of("non_linearity", self.non_linearity, [None, *NON_LINEAR])
        if self.prefix_positions < 0 or self.suffix_positions < 0 or not self.prefix_positions + self.suffix_positions:
            raise ConfigError("prefix_positions and suffix_positions: at least one position is edited")

    def places(self, model: Any) -> str | None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise NotSupported("LoReFT: of a model with encoder and decoder it is not said whose positions are meant")
        if self.target_modules is not None:
            return None
        chosen = "" if isinstance(self.layers, str) else "|".join(map(str, self.layers))
        return places(model)[0].replace(r"\d+", f"({chosen})" if chosen else r"\d+")


@method("LOREFT", config=LoReftConfig, small={"r": 2, "dropout": 0.0})
class LoReft(Adapter):
    """h' = h + P^T (act(W h + b) - P h)  at some positions, P P^T = I                                 arXiv:2404.03592, eq. 2

    W, P (r, width), b (r). Positions are the first tokens of a row behind its padding, and the last ones of its prompt: of
    what comes before the first label, or, where a call has no labels, of the tokens that no cache holds yet.
    """

    routed = on_modules = True
    starts_at_base = False

    def __init__(self, cfg: LoReftConfig, site: Site) -> None:
        super().__init__()
        site.need("LoReFT", "linear", "embedding", "norm", "module")
        self.name, self.call, self.adapter = site.name, site.call, site.adapter
        self.first, self.last = cfg.prefix_positions, cfg.suffix_positions
        self.tied = cfg.tied_weights
        wanted = {"0": self.first or self.tied, "1": self.last and not self.tied}
        self.units = nn.ModuleDict({k: Edit(cfg, width(site), site, f"units.{k}") for k, n in wanted.items() if n})

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("LoReFT edits some tokens of a row and not others: it has no weight to merge, or to read")

    def merged(self, site: Adapted) -> nn.Module:
        raise NotMergeable("LoReFT edits some tokens of a row and not others: it cannot be merged")

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        answer = base(x, *args, **kwargs)
        h, *rest = answer if isinstance(answer, tuple) else (answer,)
        where = self.call.get(self.adapter)  # (rows, tokens): 1 at the front, 2 at the end
        if where is None:  # no tokens came in: the axis before the last is theirs
            real = torch.ones_like(h[..., 0]).bool()
            where = ends(real, real.cumsum(-1) - 1, real, self.first, self.last)
        if where.shape != h.shape[:-1]:
            raise NotSupported(f"{self.name!r} answers {tuple(h.shape)}: not a vector for each of {tuple(where.shape)} tokens")
        for key, unit in self.units.items():
            on = where > 0 if self.tied else where == int(key) + 1
            h = torch.where(on[..., None], unit(h).to(h.dtype), h)
        return (h, *rest) if isinstance(answer, tuple) else h

    @classmethod
    def enter(cls, group: Group, call: Call, given: dict[str, Any]) -> Tensor | None:
        cfg: Any = group.config
        ids = next((t for n in ("input_ids", "inputs_embeds") if (t := given.get(n)) is not None), None)
        if ids is None:
            return None
        (rows, new), old = ids.shape[:2], 0 if call.cache is None else int(call.cache.get_seq_length())
        mask, position, labels = (given.get(name) for name in ("attention_mask", "position_ids", "labels"))
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = torch.ones(rows, old + new, dtype=torch.bool, device=ids.device)
        real = mask[:, -new:].bool()
        if not isinstance(position, Tensor) or position.dim() != 2:
            position = real.cumsum(1) - 1 + mask[:, :-new].sum(1, keepdim=True)
        prompt = real & (old == 0)
        if cfg.suffix_positions and given.get("layout") is not None:
            raise NotSupported("LoReFT at the end of prompts: rows that are packed do not say where theirs is; packing=False")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            prompt = prompt & ((labels != -100).cumsum(1) == 0)
        elif cfg.suffix_positions and any(a.training for _, a in group.sites()) and cfg.task_type in (None, "CAUSAL_LM"):
            raise ConfigError("suffix_positions: the end of a prompt is where labels begin, and this call has no labels")
        return ends(real, position, prompt, cfg.prefix_positions, cfg.suffix_positions)

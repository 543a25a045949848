"""IA3: a vector that scales a layer's outputs, or its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Site
from trimtab.core.base import Base
from trimtab.core.config import Excludes, FanIn, Targets, method, option
from trimtab.core.ops import along
from trimtab.core.sites import matches
from trimtab.errors import ConfigError

_TYPES = {  # model types -> targets, of which the ones behind the bar are feed-forward layers
    "t5": "k v wo | wo",
    "mt5": "k v wi_1 |",
    "gpt2 gpt_bigcode": "c_attn mlp.c_proj | mlp.c_proj",
    "bloom": "query_key_value mlp.dense_4h_to_h | mlp.dense_4h_to_h",
    "roberta bert": "key value output.dense | output.dense",
    "opt": "q_proj k_proj fc2 | fc2",
    "gptj": "q_proj v_proj fc_out | fc_out",
    "gpt_neox falcon RefinedWeb RefinedWebModel": "query_key_value dense_4h_to_h | dense_4h_to_h",
    "gpt_neo": "q_proj v_proj c_proj | c_proj",
    "bart": "q_proj v_proj fc2 | fc2",
    "llama mistral": "k_proj v_proj down_proj | down_proj",
    "mixtral": "k_proj v_proj w2 | w2",
    "llama4 gemma gemma2 gemma3_text qwen2 qwen3": "q_proj v_proj down_proj | down_proj",
    "deberta-v2": "key_proj value_proj output.dense | output.dense",
    "deberta": "in_proj output.dense | output.dense",
    "phi": "q_proj v_proj fc2 | fc2",
}
_TABLE = {t: [half.split() for half in row.split("|")] for types, row in _TYPES.items() for t in types.split()}


@dataclass(kw_only=True)
class IA3Config(Targets, Excludes, FanIn):
    feedforward_modules: list[str] | str | None = option(
        None, "the targets whose inputs are scaled; none: by model type"
    )
    init_ia3_weights: bool = option(True, "true: ones; false: random")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, (list, set)) and isinstance(self.feedforward_modules, (list, set)):
            if extra := sorted(set(self.feedforward_modules) - set(self.target_modules)):
                raise ConfigError(
                    f"feedforward_modules: {extra[0]!r} is not among target_modules, so it would not be adapted"
                )


@method("IA3", config=IA3Config)
class IA3(Adapter):
    """W' = diag(l) W,  b' = l b        or, on feed-forward layers,        W' = W diag(l)         arXiv:2205.05638, eq. 1

    l starts at 1, so W' = W. Its published shape is (out, 1) or (1, in); (1, channels, 1, ...) on convolutions.
    """

    targets = {kind: names for kind, (names, _) in _TABLE.items()}
    defaults = {"feedforward_modules": {kind: names for kind, (_, names) in _TABLE.items()}}

    def __init__(self, cfg: IA3Config, site: Site) -> None:
        super().__init__()
        self.on_input = matches(site.name, cfg.feedforward_modules or [])
        site.need("IA3", "linear", "conv", *([] if self.on_input else ["embedding", "norm"]))
        n = site.shape[1 if self.on_input else 0]
        conv = (1, n, *[1] * (len(site.shape) - 2))
        self.ia3_l = nn.Parameter(torch.ones(conv if site.kind == "conv" else (1, n) if self.on_input else (n, 1)))
        if not cfg.init_ia3_weights:
            nn.init.normal_(self.ia3_l, generator=site.generator("ia3_l"))

    def weight(self, w: Tensor) -> Tensor:
        return w * along(self.ia3_l.flatten(), w, 1 if self.on_input else 0)

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        return b if b is None or self.on_input else b * self.ia3_l.flatten()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        l = self.ia3_l.flatten()
        return base((x * base.op.inp(l)).to(x.dtype)) if self.on_input else base(x) * base.op.out(l)

"""Methods that stand around attention, feed-forward and whole layers: where those are, and what is done there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.adapter import Adapted, Adapter, Site
from trimtab.core.base import Base, port
from trimtab.core.config import Targets, in_range, one_of, option
from trimtab.core.sites import frozen, layers
from trimtab.errors import ConfigError, NotMergeable, NotSupported

# model types: a layer | its attention | its feed-forward | where its output and the residual are added up: in the layer's
# answer, or before a norm; all are regexes for paths
_TYPES = {
    "llama mistral qwen2 qwen3 gemma": r".*layers\.\d+ | self_attn | mlp |",
    "gpt2 gpt_bigcode gptj": r".*h\.\d+ | attn | mlp |",
    "gpt_neox": r".*layers\.\d+ | attention | mlp |",
    "opt": r".*layers\.\d+ | self_attn | fc2 |",
    "t5 mt5": r".*block\.\d+ | layer\.0\.SelfAttention | layer\.\d+\.DenseReluDense |",
    "bart": r".*layers\.\d+ | self_attn | fc2 | final_layer_norm",
    "bert roberta xlm-roberta electra": r".*layer\.\d+ | attention\.output\.dense | output\.dense | output\.LayerNorm",
}
_PLACES = {t: [part.strip() for part in row.split("|")] for types, row in _TYPES.items() for t in types.split()}
NON_LINEAR = {
    "relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "silu": nn.SiLU, "tanh": nn.Tanh, "leakyrelu": nn.LeakyReLU,
}  # fmt: skip


def places(model: Any) -> list[str]:
    """The paths of a layer, its attention, its feed-forward and its sum."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind not in _PLACES:
        raise ConfigError(
            f"the blocks of {kind or type(model).__name__!r} are not known: name them in target_modules, as a list of path "
            "ends or a regex. See: trimtab sites MODEL"
        )
    return _PLACES[kind]


def width(site: Site) -> int:
    """The width of what the site answers."""
    if site.shape:
        return site.shape[0]
    module: Any = site.base.layer
    for owner in (module, getattr(module, "config", None)):
        if isinstance(size := getattr(owner, "hidden_size", None), int):
            return size
    linear = [b.shape[0] for _, m in layers(module) if (b := port(frozen(m))).op.kind == "linear"]
    if not linear:
        raise NotSupported(f"{site.name!r} ({type(module).__name__}): nothing says how wide its answers are")
    return linear[-1]


@dataclass(kw_only=True)
class BlockConfig(Targets):
    mh_adapter: bool = option(True, "without target_modules: one behind each attention")
    output_adapter: bool = option(True, "without target_modules: one behind each feed-forward block")
    original_ln_before: bool = option(False, "without target_modules: the one behind feed-forward sees the residual's sum")
    is_parallel: bool = option(False, "it sees what its block sees, not what it answers")
    scaling: float | str = option(1.0, "factor of its answer; learned: one number, channel: one a channel", choices=["channel"])
    dropout: float = option(0.0, "dropout of its answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("dropout", self.dropout, 0, 1)
        if isinstance(self.scaling, str):
            one_of("scaling", self.scaling, ["learned", "channel"])

    def places(self, model: Any) -> str | None:
        if self.target_modules is not None:
            return None
        layer, attention, forward, total = places(model)
        if self.original_ln_before and (self.mh_adapter or not self.output_adapter or self.is_parallel):
            raise ConfigError("original_ln_before: only behind feed-forward, mh_adapter=False, and in a row with it")
        if not (self.mh_adapter or self.output_adapter):
            raise ConfigError("neither mh_adapter nor output_adapter: there is no place for an adapter")
        if self.is_parallel and not forward.endswith(("mlp", "DenseReluDense")):
            raise NotSupported(f"is_parallel: no one module of this model is its feed-forward block, {forward} is a part of it")
        if self.original_ln_before:
            return rf"{layer}\.{total}" if total else layer
        return rf"{layer}\.({'|'.join([attention] * self.mh_adapter + [forward] * self.output_adapter)})"


class Around(Adapter):
    """Abstract: y' = y + s f(y) of what a site answers, or y + s f(x); before a norm, norm(x + s f(norm(x)))."""

    routed = on_modules = True

    def __init__(self, cfg: Any, site: Site) -> None:
        super().__init__()
        name, self.parallel, self.norm = cfg.peft_type.capitalize(), cfg.is_parallel, site.kind == "norm"
        site.need(name, "linear", "norm", "module", *([] if cfg.is_parallel else ["embedding"]))
        self.out = width(site)
        self.inn = site.shape[1] if cfg.is_parallel and site.kind == "linear" else self.out
        self.drop, self.scaling = nn.Dropout(cfg.dropout), cfg.scaling
        if isinstance(cfg.scaling, str):
            self.scaling = nn.Parameter(torch.ones(self.out if cfg.scaling == "channel" else 1))
        self.non_linear = NON_LINEAR[cfg.non_linearity]()

    def change(self, z: Tensor) -> Tensor:
        """f: (..., in) -> (..., out)"""
        raise NotImplementedError

    def weight(self, w: Tensor) -> Tensor:
        raise NotMergeable("what stands around a block is not linear: it has no weight to merge, or for others to read")

    def merged(self, site: Adapted) -> nn.Module:
        raise NotMergeable("what stands around a block is not linear: it cannot be merged. Keep the adapter beside the model")

    def forward(self, x: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        if self.norm and not self.parallel:
            return base(x + self.drop(self.scaling * self.change(base(x))).to(x.dtype))
        answer = base(x, *args, **kwargs)
        y, *rest = answer if isinstance(answer, tuple) else (answer,)
        y = y + self.drop(self.scaling * self.change(x if self.parallel else y)).to(y.dtype)
        return (y, *rest) if isinstance(answer, tuple) else y

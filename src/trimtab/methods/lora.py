"""LoRA: a low-rank product beside the frozen weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.adapter import Adapter, Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, default_like, in_range, method, option
from trimtab.errors import ConfigError, NotSupported


@dataclass(kw_only=True)
class LoraConfig(Targets, Excludes, Layers, Biases, FanIn):
    r: int = option(8, "rank")
    lora_alpha: int | float = option(8, "the product is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "dropout on the input of the product")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732)")
    init_lora_weights: bool | str = option(True, "true: A random, B zero; gaussian; false: both random")
    lora_bias: bool = option(False, "a trained bias on B")
    rank_pattern: dict[str, int] = option(dict, "r by layer name or regex")
    alpha_pattern: dict[str, int | float] = option(dict, "lora_alpha by layer name or regex")
    use_dora: bool = option(False, "DoRA: train the length of each weight row apart from its direction", variant="dora")
    use_qalora: bool = option(False, "QA-LoRA", variant="qalora")
    alora_invocation_tokens: list[int] | None = option(None, "aLoRA", variant="alora")
    arrow_config: Any = option(None, "Arrow", variant="arrow")
    use_bdlora: dict[str, Any] | None = option(None, "BD-LoRA", variant="bdlora")
    kasa_config: dict[str, Any] | None = option(None, "KaSA", variant="kasa")
    velora_config: dict[str, Any] | None = option(None, "VeLoRA", variant="velora")
    monteclora_config: dict[str, Any] | None = option(None, "MonteCLoRA", variant="monteclora")
    target_parameters: list[str] | None = option(None, "parameters that are no layer's weight", later=True)
    trainable_token_indices: Any = option(None, "rows of the embedding that are trained", later=True)
    ensure_weight_tying: bool = option(False, "adapt tied layers alike", later=True)
    layer_replication: list[Any] | None = option(None, "stack copies of layers", later=True)
    loftq_config: dict[str, Any] = option(dict, "LoftQ", later=True)
    eva_config: dict[str, Any] | None = option(None, "EVA", later=True)
    corda_config: dict[str, Any] | None = option(None, "CorDA", later=True)
    lora_ga_config: dict[str, Any] | None = option(None, "LoRA-GA", later=True)
    megatron_config: dict[str, Any] | None = option(None, "Megatron", later=True)
    megatron_core: str | None = option("megatron.core", "Megatron", of="megatron_config")
    qalora_group_size: int = option(16, "QA-LoRA", of="use_qalora")

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self).update({k: asdict(v) for k, v in vars(self).items() if is_dataclass(v)})  # type: ignore - files hold dicts
        in_range("r", self.r, 1)
        in_range("lora_dropout", self.lora_dropout, 0, 1)
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise NotSupported(
                f"init_lora_weights={self.init_lora_weights!r}: this version knows true, false and 'gaussian'"
            )
        later = [
            n
            for n, f in self.__dataclass_fields__.items()
            if f.metadata.get("later") and not default_like(getattr(self, n))
        ]
        if later:
            raise NotSupported(f"{later[0]}={getattr(self, later[0])!r} is not supported by this version")
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias=True and use_dora=True do not go together")


@method("LORA", config=LoraConfig, small={"r": 4})
class LoRA(Adapter):
    """W' = W + s B A,  b' = b + s b_B,  s = alpha / r                                         arXiv:2106.09685, eq. 3

    A (r, in, *kernel) starts random, B (out, r / groups) at 0, so W' = W at the start. `use_rslora`: s = alpha / sqrt(r).
    """

    additive = True

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__()
        site.need("LoRA", "linear", "embedding", "conv")
        (out, *fan_in), r = site.shape, site.pick(cfg.rank_pattern, cfg.r)
        if r % site.base.op.groups:
            raise NotSupported(f"LoRA on {site.name!r}: r={r} is no multiple of its {site.base.op.groups} groups")
        if cfg.lora_bias and site.base.bias() is None:
            raise NotSupported(f"lora_bias: {site.name!r} has no bias that the trained one could be merged into")
        self.op = site.base.op
        self.lora_A = Factor(r, *fan_in)  # weight (r, in, *kernel)
        self.lora_B = Factor(out, r // self.op.groups, bias=out if cfg.lora_bias else None)  # weight (out, r / groups)
        self.drop = nn.Dropout(cfg.lora_dropout) if site.kind != "embedding" else nn.Identity()  # ids cannot be dropped
        self.s = site.pick(cfg.alpha_pattern, cfg.lora_alpha) / (r**0.5 if cfg.use_rslora else r)
        self.names = (
            {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
            if site.kind == "embedding"
            else {}
        )
        self.reset(cfg, site)

    def reset(self, cfg: LoraConfig, site: Site) -> None:
        A, B = self.lora_A.weight, self.lora_B.weight
        if site.kind == "embedding" and cfg.init_lora_weights:  # A is looked up, so it is the one that starts at 0
            nn.init.normal_(B, generator=site.generator("lora_B"))
        elif cfg.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / A.shape[0], generator=site.generator("lora_A"))
        else:
            nn.init.kaiming_uniform_(A, a=5**0.5, generator=site.generator("lora_A"))
        if not cfg.init_lora_weights:
            nn.init.kaiming_uniform_(B, a=5**0.5, generator=site.generator("lora_B"))

    def weight(self, w: Tensor) -> Tensor:
        A, B = self.lora_A.weight, self.op.full(self.lora_B.weight)
        return w + self.s * (B @ A.flatten(1)).view_as(w)

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        return b if self.lora_B.bias is None or b is None else b + self.s * self.lora_B.bias

    def forward(self, x: Tensor, base: Base) -> Tensor:  # the same line for Linear, Conv1D, Embedding and ConvNd
        A, B = self.lora_A.weight, self.lora_B.weight
        y = base(x) + self.s * base.op.mix(base.op(self.drop(x), A), B)
        return y if self.lora_B.bias is None else y + self.s * base.op.out(self.lora_B.bias)

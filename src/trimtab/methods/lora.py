"""LoRA: a low-rank product beside the frozen weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.adapter import Factor, Site
from trimtab.core.base import Base
from trimtab.core.config import Biases, Excludes, FanIn, Layers, Targets, default_like, in_range, method, option
from trimtab.errors import ConfigError, NotSupported
from trimtab.inits._start import Started, settle, without_data


@dataclass(kw_only=True)
class LoraConfig(Targets, Excludes, Layers, Biases, FanIn):
    r: int = option(8, "rank")
    lora_alpha: int | float = option(8, "the product is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "dropout on the input of the product")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732)")
    init_lora_weights: bool | str = option(
        True, "true: A random, B zero; false: both random; pissa, olora, eva, ...: docs/guide.md", choices=without_data()
    )
    lora_bias: bool = option(False, "a trained bias on B")
    rank_pattern: dict[str, int] = option(dict, "r by layer name or regex")
    alpha_pattern: dict[str, int | float] = option(dict, "lora_alpha by layer name or regex")
    use_dora: bool = option(False, "DoRA: train the length of each weight row apart from its direction", variant="dora")
    use_qalora: bool = option(False, "QA-LoRA: A reads the means of groups of inputs", variant="qalora")
    alora_invocation_tokens: list[int] | None = option(None, "aLoRA: it acts from these tokens on", variant="alora")
    arrow_config: Any = option(None, "Arrow: LoRAs by token", variant="arrow", holds="methods.arrow.ArrowConfig")
    use_bdlora: Any = option(None, "BD-LoRA: A or B of blocks", variant="bdlora", holds="methods.bdlora.BdLoraConfig")
    kasa_config: Any = option(None, "KaSA: trained singular values", variant="kasa", holds="methods.kasa.KasaConfig")
    velora_config: Any = option(None, "VeLoRA: less of x kept", variant="velora", holds="methods.velora.VeloraConfig")
    monteclora_config: Any = option(
        None, "MonteCLoRA: learned noise on A", variant="monteclora", holds="methods.monteclora.MontecloraConfig"
    )
    target_parameters: list[str] | None = option(None, "parameters, as those of experts", place="_parameters")
    trainable_token_indices: Any = option(None, "ids of tokens to train, or {layer: ids}", place="_token_rows")
    ensure_weight_tying: bool = option(False, "adapt layers that share a weight alike", place="_tied")
    layer_replication: list[Any] | None = option(None, "[[a, b], ...]: layers a to b - 1, stacked", place="_replication")
    loftq_config: Any = option(dict, "LoftQConfig: bits, and rounds of the fit")
    eva_config: Any = option(None, "EvaConfig: how ranks are spread")
    corda_config: Any = option(None, "CordaConfig: what is trained, and files")
    lora_ga_config: Any = option(None, "LoraGAConfig: directions and size")
    megatron_config: dict[str, Any] | None = option(None, "Megatron", later=True)
    megatron_core: str | None = option("megatron.core", "Megatron", of="megatron_config")
    qalora_group_size: int = option(16, "inputs in a group of QA-LoRA", of="use_qalora")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("r", self.r, 1)
        in_range("lora_dropout", self.lora_dropout, 0, 1)
        settle(self)
        fields = self.__dataclass_fields__.items()
        if later := [n for n, f in fields if f.metadata.get("later") and not default_like(getattr(self, n))]:
            raise NotSupported(f"{later[0]}={getattr(self, later[0])!r} is not supported by this version")
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias=True and use_dora=True do not go together")


@method("LORA", config=LoraConfig, small={"r": 4})
class LoRA(Started):
    """W' = W + s B A,  b' = b + s b_B,  s = alpha / r                                         arXiv:2106.09685, eq. 3

    A (r, in, *kernel) and B (out, r / groups) start by `init_lora_weights`, a file in `inits/`: A random and B at 0 unless
    asked otherwise. `use_rslora`: s = alpha / sqrt(r). A layer without a bias is merged into one that has b_B.
    """

    additive = True

    def __init__(self, cfg: LoraConfig, site: Site) -> None:
        super().__init__()
        site.need("LoRA", "linear", "embedding", "conv")
        (out, *fan_in), (r, self.s) = site.shape, self.scale(cfg, site)
        if r % site.base.op.groups:
            raise NotSupported(f"LoRA on {site.name!r}: r={r} is no multiple of its {site.base.op.groups} groups")
        if cfg.lora_bias and site.kind == "embedding":
            raise NotSupported(f"lora_bias: {site.name!r} is an embedding, which has no bias that it could be merged into")
        self.op = site.base.op
        self.lora_A = Factor(r, *fan_in)  # weight (r, in, *kernel)
        ones = [1] * (len(fan_in) - 1)  # the file has B as a convolution where A is one
        self.lora_B = Factor(out, r // self.op.groups, *ones, bias=out if cfg.lora_bias else None)  # (out, r / groups)
        self.drop = nn.Dropout(cfg.lora_dropout) if site.kind != "embedding" else nn.Identity()  # ids cannot be dropped
        if site.kind == "embedding":
            self.names = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
        self.begin(cfg, site)

    @staticmethod
    def scale(cfg: LoraConfig, site: Site) -> tuple[int, float]:
        """r and s"""
        r = site.pick(cfg.rank_pattern, cfg.r)
        return r, site.pick(cfg.alpha_pattern, cfg.lora_alpha) / (r**0.5 if cfg.use_rslora else r)

    def moved(self, w: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W + s B A. A variant puts its own factors in."""
        return w + self.s * (self.op.full(B) @ A.flatten(1)).view_as(w)

    def plus(self, y: Tensor, h: Tensor, base: Base, B: Tensor) -> Tensor:
        """y + s (B h + b_B)"""
        y = y + self.s * base.op.mix(h, B)
        return y if self.lora_B.bias is None else y + self.s * base.op.out(self.lora_B.bias)

    def weight(self, w: Tensor) -> Tensor:
        return self.moved(w, *self.factors())

    def bias(self, b: Tensor | None, w: Tensor) -> Tensor | None:
        more = self.s * self.lora_B.bias if self.lora_B.bias is not None else None
        return b if more is None else more if b is None else b + more

    def forward(self, x: Tensor, base: Base) -> Tensor:  # the same line for Linear, Conv1D, Embedding and ConvNd
        A, B = self.factors()
        return self.plus(base(x), base.op(self.drop(x), A), base, B)

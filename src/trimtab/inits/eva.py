"""EVA: A starts as the principal components of the layer's inputs, and ranks go where they explain most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import states
from trimtab.core import group as groups
from trimtab.core.adapter import Site
from trimtab.core.config import in_range, option
from trimtab.errors import ConfigError
from trimtab.inits import _calibrate as data
from trimtab.inits import _ranks as ranks
from trimtab.inits._start import init
from trimtab.inits.kaiming import Kaiming


@dataclass(kw_only=True)
class EvaConfig:
    rho: float = option(2.0, "a layer's rank is at most r * rho; 1: all ranks stay as they are")
    tau: float = option(0.99, "cosine between a component and what it was a batch before, at which it is settled")
    use_label_mask: bool = option(True, "look at positions with a label only")
    label_mask_value: int = option(-100, "the label of a position without one")
    whiten: bool = option(False, "divide each component by the root of its singular value")
    adjust_scaling_factors: bool = option(True, "lora_alpha goes with the rank of a layer")

    def __post_init__(self) -> None:
        in_range("rho", self.rho, 1)
        in_range("tau", self.tau, 0, 1)


@init
class EVA(Kaiming):
    """A = V_r^T, B = 0, where the rows of V^T (in) are the principal components of the layer's inputs      arXiv:2410.07170

    Of the components of all layers as many are kept as all ranks together, those that explain the largest share of their
    layer's variance; a layer without any gets no adapter. Before it has seen data, it is LoRA's usual start.
    """

    kinds, options, needs = ("linear",), EvaConfig, "initialize_lora_eva_weights"

    def __init__(self, cfg: Any, rest: str = "") -> None:
        super().__init__(cfg, rest)
        cfg.eva_config = cfg.eva_config or EvaConfig()

    def draw(self, A: Tensor, site: Site) -> None:
        found = data.taken(site, "eva")
        super().draw(A, site) if found is None else A.copy_(found["A"])

    def calibrate(self, model: nn.Module, batches: Iterable[Any]) -> None:
        ranks.spread(data.sites_of(model, self.cfg), self.cfg, get_eva_state_dict(model, batches, self.cfg))


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Any = ranks.forward_fn_dict,
    prepare_model_inputs_fn: Any = ranks.prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = ranks.prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The components (rank, in) of each layer by its name, from one pass over `dataloader`, or as much of it as it takes until
    all have settled. On a bare model `peft_config` says which layers. Between ranks, those of the first count."""
    bare = data.bare(model)
    if (cfg := peft_config or (groups.group(bare, adapter_name).config if bare is not model else None)) is None:
        raise ConfigError("get_eva_state_dict: peft_config is needed where the model carries no adapter")
    sites, prefix = data.sites_of(model, cfg, adapter_name), ranks.PREFIX if bare is not model else ""
    seen = ranks.Seen(sites, cfg, prepare_layer_inputs_fn, prefix)
    with data.mode(bare, training=False), data.watched(sites, seen.look), states.disabled(bare):
        for batch in (data.moved(given, data.device_of(bare)) for given in dataloader):
            seen.next(prepare_model_inputs_fn(batch, cfg) if prepare_model_inputs_fn else batch)
            forward_fn(model, batch)
            if seen.settled():
                break
    found = {prefix + name: A for name, A in seen.chosen().items()}
    return data.of_the_first(found) if gather_distributed_inputs else found


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Any = ranks.forward_fn_dict,
    prepare_model_inputs_fn: Any = ranks.prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = ranks.prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Make the adapter anew with the components, or those of `eva_state_dict`, and the ranks that follow from them. Call it
    before the optimizer is made. The adapter must have `init_lora_weights="eva"` and no other be active beside it."""
    bare = data.bare(model)
    cfg: Any = (old := groups.group(bare, adapter_name)).config
    if len(groups.active(bare)) > 1 or cfg.init_lora_weights != "eva":
        raise ConfigError("initialize_lora_eva_weights: the adapter must have init_lora_weights='eva', and be active alone")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("initialize_lora_eva_weights: a dataloader or an eva_state_dict is needed")
        how = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name, gather_distributed_inputs)
        eva_state_dict = get_eva_state_dict(model, dataloader, cfg, *how)
    ranks.spread(data.sites_of(model, cfg, adapter_name), cfg, eva_state_dict)
    data.remade(bare, old)

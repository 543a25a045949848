"""What can be done to a model that carries adapters, as methods under the names that the field knows."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from trimtab import blend, states
from trimtab.core import group as groups
from trimtab.core.base import port
from trimtab.core.config import PeftConfig
from trimtab.core.layer import AdapterLayer
from trimtab.core.sites import frozen
from trimtab.errors import ConfigError, NoMatch, TrimtabWarning
from trimtab.scalings import Scalings

SPENT = "this PeftModel carries no adapter any more; go on with the model that merge_and_unload() or unload() returned"


class Verbs(Scalings, nn.Module):
    """What can be done to a model that carries adapters. `PeftModel` and its `base_model` both have it."""

    def get_base_model(self) -> nn.Module:
        raise NotImplementedError

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return {name: g.config for name, g in groups.groups(self.get_base_model()).items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order they apply."""
        return groups.active(self.get_base_model())

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active, in this order, and, unless `inference_mode`, the only trainable ones."""
        groups.activate(self.get_base_model(), adapter_name, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off. Where it was the only active one, the first that is left becomes active."""
        model = self.get_base_model()
        groups.delete(model, adapter_name)
        if not groups.active(model) and (left := list(groups.groups(model))):
            warnings.warn(f"adapter {adapter_name!r} was active; {left[0]!r} is now", TrimtabWarning)
            groups.activate(model, left[0])

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            groups.group(self.get_base_model(), name).trainable(requires_grad)

    def update_and_allocate(self, global_step: int) -> None:
        """For a training loop of one's own: tells budgets (AdaLoRA, AdaMSS) that step number `global_step`, counted from 1,
        is done. It stands between `optimizer.step()` and `zero_grad()`, for they need the gradients."""
        for group in groups.groups(self.get_base_model()).values():
            if group.live:
                group.step(global_step)

    def enable_adapter_layers(self) -> None:
        states.disable(self.get_base_model(), False)

    def disable_adapter_layers(self) -> None:
        states.disable(self.get_base_model(), True)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> blend.Fit:
        """Put a LoRA beside the others that does sum_i weights_i * (what adapter i does), whatever their methods; it is
        frozen and not active. How, and how exactly, by `combination_type`: see `trimtab.blend.Recipe`. Returns how near it
        is by layer. `svd_full_matrices` changes nothing."""
        recipe = blend.Recipe(
            combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method, seed=adapter_name
        )
        return blend.add_weighted_adapter(self.get_base_model(), adapter_name, adapters, weights, recipe)

    def merge_adapter(self, adapter_names: list[str] | str | None = None, safe_merge: bool = False) -> None:
        """Write active adapters into the weights. `safe_merge`: raise if a weight would not be finite."""
        states.merge(self.get_base_model(), adapter_names, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """The original weights again, bit for bit, on every base."""
        states.unmerge(self.get_base_model())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """The plain base model with the adapters in its weights. This object is spent afterwards."""
        self.merge_adapter(adapter_names, safe_merge)
        base = self.get_base_model()
        tell_new_biases(base, [name for name, layer in groups.adapted(base) if has_new_bias(layer)])
        model: Any = self._unloaded()
        untie(model)
        return model

    def unload(self) -> Any:
        """The plain base model without adapters. This object is spent afterwards."""
        if merged := sorted({n for _, layer in groups.adapted(self.get_base_model()) for n in layer.merged_adapters}):
            raise ConfigError(
                f"{', '.join(merged)}: merged, so that this would not be the base model. unmerge_adapter() first; or "
                f"merge_and_unload(), which gives the merged model"
            )
        return self._unloaded()

    def _unloaded(self) -> Any:
        model = self.get_base_model()
        states.unload(model)
        tuner: Any = self._modules.get("base_model", self)
        del tuner._modules["model"]  # what is done with this object from now on would be done to nothing
        return model

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.get_base_model()  # raises where this object is spent, and so do `parameters`, `zero_grad`, ...
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.get_base_model()
        return super().state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            spent = not self.__dict__.get("_modules", {}).get("base_model", self).__dict__.get("_modules")
            if spent and (name.startswith("_") or "_modules" not in self.__dict__ or name == "model"):
                raise
            return getattr(self.get_base_model(), name)


def untie(model: Any) -> None:
    """Tied weights of which one was merged are no longer equal: say so in the config, or a reload would tie them again."""
    config, inp, out = (
        getattr(model, "config", None),
        getattr(model, "get_input_embeddings", None),
        getattr(model, "get_output_embeddings", None),
    )
    if config is None or inp is None or out is None or not getattr(config, "tie_word_embeddings", False):
        return
    if (head := out()) is not None and head.weight is not inp().weight:
        if head.weight.shape == inp().weight.shape and torch.equal(head.weight, inp().weight):
            head.weight = inp().weight  # merged alike
        else:
            config.tie_word_embeddings = False


def has_new_bias(layer: AdapterLayer) -> bool:
    return port(frozen(layer)).bias() is None and layer.port.bias() is not None


def tell_new_biases(model: nn.Module, grown: list[str]) -> None:
    """Of biases that merging made, the model's class knows nothing: a saved copy would lose them when it is loaded."""
    if grown:
        more = f" and {len(grown) - 1} more layers have" if len(grown) > 1 else " has"
        warnings.warn(
            f"{grown[0]!r}{more} a bias now, which {type(model).__name__} does not make when a saved copy is loaded:"
            " keep the adapter and load it on the base",
            TrimtabWarning,
        )


class Tuner(Verbs):
    """`PeftModel.base_model`: the adapted model is its `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        if "model" not in self._modules:
            raise NoMatch(SPENT)
        return self._modules["model"]  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

"""X-LoRA on a model: its experts are loaded with it, and its scalings can be read and steered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.core import group as groups
from trimtab.core.config import CONFIG_FILE, PeftConfig, replaced
from trimtab.errors import ConfigError, NoMatch
from trimtab.undone import undone


def load_experts(model: Any, config: Any) -> None:
    """Put the adapters on that `config.adapters` names, unless one of that name is there already."""
    base = model.get_base_model()
    loaded: list[str] = []
    with undone(lambda: [groups.delete(base, name) for name in loaded]):
        for name, path in config.adapters.items():
            if name not in groups.groups(base):
                model.load_adapter(path, name)
                loaded.append(name)
    if config.hidden_size is None:
        text = base.config.get_text_config() if hasattr(base, "config") else None
        if (size := getattr(text, "hidden_size", None)) is None:
            raise ConfigError(f"hidden_size: {type(base).__name__} does not say the width of its hidden states, so say it")
        config.hidden_size = size


def beside(config: PeftConfig, folder: Path) -> PeftConfig:
    """The config of a saved X-LoRA with the experts that were saved in its folder, where there are any."""
    known: dict[str, str] | None = getattr(config, "adapters", None)
    if not known:
        return config
    own = {name: str(folder / name) for name in known if (folder / name / CONFIG_FILE).is_file()}
    return replaced(config, adapters=known | own)


class Scalings:
    """The verbs of X-LoRA, under the names that the field knows."""

    def get_base_model(self) -> nn.Module:
        raise NotImplementedError

    def _classifier(self) -> Any:
        found = [g for g in groups.groups(self.get_base_model()).values() if g.config.peft_type == "XLORA"]
        if not found:
            raise NoMatch("no X-LoRA is on this model, so there are no scalings")
        return next((g for g in found if g.active), found[0]).shared

    def set_topk_lora(self, value: int | None) -> None:
        """Let only so many experts act at a token; None: all."""
        router = self._classifier()
        router.cfg.top_k_lora = value
        router.cfg.__post_init__()

    def set_global_scaling_weight(self, weight: float) -> None:
        self._classifier().cfg.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self._classifier().cfg.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """The scaling of every expert in the first pass; None: one over their number."""
        router = self._classifier()
        router.cfg.scaling_pass_value = 1 / router.count if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """(rows, tokens, layers, experts) of the last forward; None before one."""
        return self._classifier().latest

    def enable_scalings_logging(self) -> None:
        self._classifier().logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no more of them; the log stays."""
        self._classifier().logging = False

    def clear_scalings_log(self) -> None:
        self._classifier().logged.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """Those of each forward since logging is on."""
        return list(self._classifier().logged)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """By number of tokens: the places in the log, and the scalings."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self._classifier().logged):
            places, tensors = found.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            tensors.append(scalings)
        return found

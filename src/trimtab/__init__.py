"""trimtab: fine-tune a large frozen model with a small trained part.

Everything public is in `__all__`, and beside it the config class of every method and initialisation: the files of `methods/`
and `inits/` are looked through for it, so that a new one is known here by being there.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from trimtab.cartridges import (
        compose_cartridge_adapters,
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
        prompt_embeddings_from_past_key_values,
    )
    from trimtab.convert import convert_to_lora, save_as_lora
    from trimtab.core.config import PeftConfig, TaskType, get_peft_config
    from trimtab.experts import create_arrow_model
    from trimtab.hotswap import (
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        prepare_model_for_compiled_hotswap,
        rescale_adapter_scale,
    )
    from trimtab.inits.corda import preprocess_corda
    from trimtab.inits.eva import get_eva_state_dict, initialize_lora_eva_weights
    from trimtab.inits.loftq import replace_lora_weights_loftq
    from trimtab.inits.lora_ga import preprocess_loraga
    from trimtab.inject import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from trimtab.methods.lora import LoraConfig
    from trimtab.model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
        prepare_model_for_kbit_training,
    )
    from trimtab.status import get_layer_status, get_model_status
    from trimtab.train.trainer import Trainer

__version__ = "0.1.0"

# Looked up in this order when a name is first asked for: torch and transformers take seconds to import, and
# `trimtab --help` needs neither.
_HOMES = (
    "core.config",
    "inits.corda",
    "inits.eva",
    "inits.loftq",
    "inits.lora_ga",
    "methods.lora",
    "model",
    "inject",
    "status",
    "convert",
    "hotswap",
    "auto",
    "experts",
    "train.trainer",
    "cartridges",
)

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TaskType",
    "Trainer",
    "compose_cartridge_adapters",
    "convert_to_lora",
    "create_arrow_model",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    for module in _homes(name):
        if name in vars(module):
            return globals().setdefault(name, vars(module)[name])
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def _homes(name: str) -> Iterator[ModuleType]:
    if name in __all__:
        yield from (importlib.import_module(f"trimtab.{home}") for home in _HOMES)
    elif name.endswith("Config") and not name.startswith("_"):
        find = importlib.import_module("trimtab.core.config").modules
        modules = [*find(), *find("trimtab.inits")]
        stem = name.removesuffix("Config").lower()
        for module in sorted(modules, key=lambda m: m.rpartition(".")[2].replace("_", "") != stem):  # likeliest first
            yield importlib.import_module(module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

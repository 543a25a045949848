"""trimtab: fine-tune a large frozen model with a small trained part. Everything public is in `__all__`."""

from __future__ import annotations

import importlib
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
    from trimtab.core.config import PeftConfig, TaskType, get_peft_config
    from trimtab.methods.adalora import AdaLoraConfig
    from trimtab.methods.adamss import AdamssConfig
    from trimtab.methods.deft import DeftConfig
    from trimtab.methods.delora import DeloraConfig
    from trimtab.methods.frod import FrodConfig
    from trimtab.methods.glora import GloraConfig
    from trimtab.methods.gralora import GraloraConfig
    from trimtab.methods.hira import HiraConfig
    from trimtab.methods.ia3 import IA3Config
    from trimtab.methods.lily import LilyConfig
    from trimtab.methods.loha import LoHaConfig
    from trimtab.methods.lokr import LoKrConfig
    from trimtab.methods.lora import LoraConfig
    from trimtab.methods.oft import OFTConfig
    from trimtab.methods.peanut import PeanutConfig
    from trimtab.methods.prompt.prefix_tuning import PrefixTuningConfig
    from trimtab.methods.prompt.prompt_tuning import PromptTuningConfig
    from trimtab.methods.pvera import PveraConfig
    from trimtab.methods.randlora import RandLoraConfig
    from trimtab.methods.tinylora import TinyLoraConfig
    from trimtab.methods.unilora import UniLoraConfig
    from trimtab.methods.vblora import VBLoRAConfig
    from trimtab.methods.vera import VeraConfig
    from trimtab.model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )
    from trimtab.status import get_layer_status, get_model_status
    from trimtab.train.trainer import Trainer

__version__ = "0.1.0"

# Looked up in this order when a name is first asked for: torch and transformers take seconds to import, and
# `trimtab --help` needs neither.
_HOMES = (
    "core.config",
    "methods.lora",
    "methods.ia3",
    "methods.oft",
    "methods.vera",
    "methods.adalora",
    "methods.adamss",
    "methods.deft",
    "methods.delora",
    "methods.frod",
    "methods.glora",
    "methods.gralora",
    "methods.hira",
    "methods.lily",
    "methods.loha",
    "methods.lokr",
    "methods.peanut",
    "methods.pvera",
    "methods.randlora",
    "methods.tinylora",
    "methods.unilora",
    "methods.vblora",
    "methods.prompt.prefix_tuning",
    "methods.prompt.prompt_tuning",
    "model",
    "status",
    "auto",
    "train.trainer",
)

__all__ = [
    "AdaLoraConfig",
    "AdamssConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "DeftConfig",
    "DeloraConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HiraConfig",
    "IA3Config",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "OFTConfig",
    "PeanutConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "PveraConfig",
    "RandLoraConfig",
    "TaskType",
    "TinyLoraConfig",
    "Trainer",
    "UniLoraConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"trimtab.{home}")
            if name in vars(module):
                return globals().setdefault(name, vars(module)[name])
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""trimtab: fine-tune a large frozen model with a small trained part. Everything public is in `__all__`."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from trimtab.methods.ia3 import IA3Config
from trimtab.methods.lora import LoraConfig
from trimtab.methods.oft import OFTConfig
from trimtab.methods.prompt.prefix_tuning import PrefixTuningConfig
from trimtab.methods.prompt.prompt_tuning import PromptTuningConfig
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

if TYPE_CHECKING:
    from trimtab.train.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "IA3Config",
    "LoraConfig",
    "OFTConfig",
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
    "TaskType",
    "Trainer",
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


def __getattr__(name: str) -> object:
    if name == "Trainer":  # transformers' Trainer takes seconds to import, and most who import trimtab do not train
        from trimtab.train.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")

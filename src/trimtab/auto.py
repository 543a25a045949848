"""`AutoPeftModelFor...`: base model and adapter in one call, from the adapter's folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from trimtab import store, vocabulary
from trimtab.core.config import PeftConfig
from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.model import PeftModel


class AutoPeftModel:
    """`from_pretrained` reads the adapter's config, loads the base model it names, and puts the adapter on it."""

    task: ClassVar[str | None] = None
    loader: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise ConfigError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """`kwargs` go to the base model's `from_pretrained` (dtype, quantization_config, device_map, ...)."""
        import transformers

        path = store.folder(pretrained_model_name_or_path)
        config = config or PeftConfig.from_pretrained(path)
        if cls.task is not None and config.task_type not in (None, cls.task):
            raise ConfigError(f"{path} is an adapter for {config.task_type}, and {cls.__name__} loads {cls.task}")
        if not config.base_model_name_or_path:
            raise BadCheckpoint(
                f"{path} does not name its base model; load that yourself and use PeftModel.from_pretrained"
            )
        name = cls.loader or (config.auto_mapping or {}).get("base_model_class") or _LOADERS.get(config.task_type or "")
        if name is None or not hasattr(transformers, name):
            raise BadCheckpoint(
                f"{path} says neither task nor class of its base model; use an AutoPeftModelFor... class"
            )
        base = getattr(transformers, name).from_pretrained(config.base_model_name_or_path, **kwargs)
        if not vocabulary.needed(base, config, store.read(path), path):  # else it grows, if it must, when the adapter is loaded
            _resize(base, path)
        return PeftModel.from_pretrained(base, path, adapter_name, is_trainable=is_trainable, config=config)


def _resize(base: Any, path: Path) -> None:
    """A tokenizer saved beside the adapter with tokens of its own: the embedding grows to hold them."""
    if (path / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        size = len(AutoTokenizer.from_pretrained(path))
        if size > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(size)


class AutoPeftModelForCausalLM(AutoPeftModel):
    task, loader = "CAUSAL_LM", "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task, loader = "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task, loader = "SEQ_CLS", "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task, loader = "TOKEN_CLS", "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task, loader = "QUESTION_ANS", "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task, loader = "FEATURE_EXTRACTION", "AutoModel"


_LOADERS = {c.task: c.loader for c in AutoPeftModel.__subclasses__()}

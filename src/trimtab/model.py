"""`PeftModel`: a torch model with adapters, under the names that the field knows."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

import trimtab.fused  # noqa: F401 # pyright: ignore[reportUnusedImport] - registers the faster forms
from trimtab import mergeable, mixed, origin, scalings, states, store, vocabulary
from trimtab.bounded import bounded
from trimtab.core import group as groups
from trimtab.core.config import PeftConfig, replaced
from trimtab.core.group import Group
from trimtab.errors import ConfigError, NoMatch
from trimtab.status import count_parameters, get_layer_status, get_model_status
from trimtab.undone import undone
from trimtab.verbs import SPENT, Tuner, Verbs


class Forward:
    """A bound forward that shows the signature of the model underneath, by which trainers choose the columns of a dataset.
    In training, a loss that the model returns has the methods' penalties in it."""

    def __init__(self, owner: PeftModel) -> None:
        self.owner = owner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.owner.get_base_model().forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.owner.alive()
        model: Any = self.owner.get_base_model()
        output = model(*args, **kwargs)
        if self.owner.training and isinstance(getattr(output, "loss", None), Tensor):
            for group in mixed.present(model):
                if (penalty := group.penalty()) is not None:
                    output.loss = output.loss + penalty
        return output


def _blank(cls: type[Any]) -> Any:
    new: Any = object.__new__(cls)
    return new


class PeftModel(Verbs):
    """A model with adapters, standing where the model stood: what it does not define is the base model's.

    Like any transparent proxy it answers `isinstance(m, PreTrainedModel)` as the model it wraps, so that trainers save it
    with `save_pretrained`; `type(m)` is its own.
    """

    _hf_peft_config_loaded = True  # transformers: a quantised model with trainable adapters on it

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(model, Verbs) or groups.groups(model):
            raise ConfigError(
                "this model carries adapters already; wrapping it again would hide them. Use add_adapter or load_adapter"
            )
        self.base_model = Tuner(model)
        self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        groups.activate(model, adapter_name, trainable=not peft_config.inference_mode)

    @property
    def __class__(self) -> type[Any]:  # type: ignore[override]
        tuner: Any = self.__dict__.get("_modules", {}).get("base_model")
        known = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
        found = tuner._modules.get("model") if tuner is not None else None
        return cast("type[Any]", type(found if known is not None and isinstance(found, known) else self))

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle and deepcopy go by the true type
        return _blank, (type(self),), self.__dict__

    def __repr__(self) -> str:
        return super().__repr__().replace(f"{self._get_name()}(", f"{type(self).__name__}(", 1)

    @property
    def forward(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.__dict__.get("wrapped_forward") or Forward(self)

    @forward.setter
    def forward(self, call: Any) -> None:  # type: ignore[override]
        """Mixed precision wraps a model's forward and, in the end, puts the model's own back, bound to the model."""
        own = isinstance(getattr(call, "__func__", call), Forward)
        self.__dict__["wrapped_forward"] = None if own else call

    def alive(self) -> None:
        if not groups.groups(self.get_base_model()):
            raise NoMatch(SPENT)

    def get_base_model(self) -> nn.Module:
        tuner: Any = self._modules["base_model"]
        return tuner.get_base_model()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.alive()
        with mixed.generating(self.get_base_model(), args, kwargs):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def active_adapter(self) -> str:
        return (self.active_adapters or ["default"])[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @contextmanager
    def disable_adapter(self) -> Generator[None, None, None]:
        """Within it the model answers as the untouched base, bit for bit, biases and saved modules included."""
        with states.disabled(self.get_base_model()):
            yield

    # -- adapters -----------------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter of any method; it is neither active nor trained until `set_adapter`."""
        self._attach(adapter_name, peft_config, autocast_adapter_dtype, strict=True)

    def _attach(self, name: str, config: PeftConfig, full_precision: bool, *, strict: bool) -> Group:
        model: Any = self.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
        if config.task_type is None and config.auto_mapping is None:
            kind = cast("type[Any]", type(model))
            config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        if getattr(config, "adapters", None):
            scalings.load_experts(self, config)
        group = groups.attach(model, config, name, full_precision=full_precision, strict=strict)
        mixed.watch(model)
        if strict:
            mergeable.warn(group)
        return group

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """A model with the adapter in folder `model_id`, in eval mode and frozen unless `is_trainable`.

        Strict, as `load_adapter` (same `kwargs`): raises `BadCheckpoint` where the file does not fit this model.
        """
        path = store.folder(model_id, kwargs.pop("subfolder", None))
        config = config or PeftConfig.from_pretrained(path)
        made = _class_for(config.task_type if cls is PeftModel else None, cls)
        new = made.__new__(made)
        Verbs.__init__(new)
        if isinstance(model, Verbs) or groups.groups(model):
            raise ConfigError("this model carries adapters already; load_adapter puts another one beside them")
        new.base_model = Tuner(model)
        kwargs |= {"is_trainable": is_trainable, "autocast_adapter_dtype": autocast_adapter_dtype, "config": config}
        new.__dict__["load_report"] = new.load_adapter(path, adapter_name, **kwargs)
        groups.activate(model, adapter_name, trainable=is_trainable)
        return new if is_trainable else new.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        allow_pickle: bool = False,
        config: PeftConfig | None = None,
        subfolder: str | None = None,
    ) -> store.LoadReport:
        """Put the adapter of a folder beside the others, not active yet. Any key that is missing, unexpected or mis-shaped
        raises and leaves the model as it was; `strict=False` returns the report instead. A base that lacks the rows of added
        tokens, which the file holds, is made longer."""
        model, path = self.get_base_model(), store.folder(model_id, subfolder)
        config = replaced(config or PeftConfig.from_pretrained(path), inference_mode=not is_trainable)
        origin.check(path, model, strict=strict)
        tensors = store.read(path, allow_pickle=allow_pickle)
        for pattern, new in (key_mapping or {}).items():
            tensors = {re.sub(pattern, new, k): v for k, v in tensors.items()}
        with vocabulary.lengthened(model, config, tensors, path, strict=strict):
            fresh = adapter_name not in groups.groups(model)
            if fresh:
                config = scalings.beside(config, path)
                if whole := store.saved_whole(model, config, tensors):
                    config = replaced(config, modules_to_save=whole)
                with bounded(model, tensors, str(path)):
                    self._attach(adapter_name, config, autocast_adapter_dtype, strict=False)
            group = groups.group(model, adapter_name)
            with undone(groups.delete, model, adapter_name) if fresh else nullcontext():
                report = store.load(
                    model, group, tensors, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes, source=str(path)
                )
            if fresh:
                group.trainable(is_trainable)
        return report

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write each adapter: `default` into the folder itself, others into `<folder>/<name>`. What is saved is what the
        adapter trains, never the frozen base. Raises `ConfigError` for `safe_serialization=False`: pickle is not written."""
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle; adapters are written as safetensors only")
        if save_embedding_layers is True:
            raise ConfigError(
                "save_embedding_layers=True: a frozen embedding is not saved; train it with modules_to_save=['embed_tokens']"
            )
        self.alive()
        if not is_main_process:
            return
        known = groups.groups(self.get_base_model())
        for name in selected_adapters or known:
            group = groups.group(self.get_base_model(), name)
            values = (
                {id(t): state_dict[k] for k, t in self.state_dict(keep_vars=True).items() if k in state_dict}
                if state_dict
                else None
            )
            folder = Path(save_directory) / ("" if name == "default" else name)
            store.save(folder, group, values)
            origin.write(folder, self.get_base_model(), vocabulary.rows(self.get_base_model()))

    # -- counting -----------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all): tied weights once, a quantised weight as the numbers it stands for."""
        return count_parameters(self.get_base_model())

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> Any:
        return get_layer_status(self)

    def get_model_status(self) -> Any:
        return get_model_status(self)


class PeftModelForCausalLM(PeftModel): ...


class PeftModelForSeq2SeqLM(PeftModel): ...


class PeftModelForSequenceClassification(PeftModel): ...


class PeftModelForTokenClassification(PeftModel): ...


class PeftModelForQuestionAnswering(PeftModel): ...


class PeftModelForFeatureExtraction(PeftModel): ...


_BY_TASK = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _class_for(task: str | None, default: type[PeftModel] = PeftModel) -> type[PeftModel]:
    return _BY_TASK.get(task or "", default)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze `model` and put a trainable adapter on it, in place.

    Adapters are float32 on float16 and bfloat16 bases (`autocast_adapter_dtype`). `mixed` changes nothing: adapters of
    different methods may stand on any model. Raises `NoMatch`, `NotSupported` or `ConfigError` and changes nothing then.
    """
    if revision is not None:
        peft_config.revision = revision
    return _class_for(peft_config.task_type)(
        model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
    )


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """Freeze a quantised model and, if asked, checkpoint its activations (non-reentrant by default).

    No weight is raised to float32: norms and losses compute in it anyway, and a raised embedding costs more memory than
    4 bit saves.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        checkpoint_activations(model, gradient_checkpointing_kwargs)
        model.enable_input_require_grads()
    return model


def checkpoint_activations(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Recompute activations in the backward. Non-reentrant by default: a frozen embedding does not cut the graph."""
    settings = settings or {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name of it since transformers 5.2
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)

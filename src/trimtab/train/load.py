"""A base model and its tokenizer from a folder: offline, from safetensors, in the dtype that was chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimtab.bases.held import hold
from trimtab.errors import ConfigError, nearest
from trimtab.headers import header, shards, tensors
from trimtab.masters import HALVES
from trimtab.train.device import native_bf16

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as headers of safetensors call them
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def model_folder(name: str) -> Path:
    """The folder that `name` means: itself, or the snapshot of a hub id in the local cache. Nothing is downloaded."""
    path = Path(name).expanduser()
    if not name:
        raise ConfigError("no model was given: --model FOLDER")
    if not path.exists():
        return _cached(name)
    if not path.is_dir():
        raise ConfigError(f"model {name!r} is a file; a model is the folder that holds its config.json")
    if not (path / "config.json").is_file():
        raise ConfigError(_no_config(path))
    _bare(path)
    weights = [*path.glob("*.safetensors")]
    pickles = [f.name for pattern in PICKLES for f in path.glob(pattern)]
    if not weights and pickles:
        raise ConfigError(
            f"model {name!r} holds only pickled weights ({', '.join(sorted(pickles)[:3])}), which can run code. "
            f"Convert them once to safetensors, where you trust them: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
        )
    if not weights:
        raise ConfigError(f"model {name!r} has a config.json and no *.safetensors beside it: is the download complete?")
    return path


def _bare(path: Path) -> None:
    """transformers puts the adapter in a model's folder on the model unasked, where `peft` is installed: no base then."""
    if (path / "adapter_config.json").is_file() and (path / "config.json").is_file():
        raise ConfigError(
            f"{str(path)!r} holds a model and an adapter (adapter_config.json): which of the two is meant is not plain. "
            f"Fix: move adapter_config.json and the adapter's other files into a folder of their own"
        )


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model or adapter folder. It always has a pad token: masks are by position, so eos will do."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last two: JSON of another form
        raise ConfigError(f"no tokenizer could be read from {name}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    held: bool = False,
) -> Any:
    """The frozen base model on `device`. In 4 bit the layers compute in `dtype`, as the rest of the model does.

    held: for what trains and answers. On a CPU, float32 layers then hold weights that are stored in 16 bits in those 16 bits,
    and so does a bfloat16 model that this CPU cannot multiply: it computes in float32, too.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if Path(name).is_dir():
        _bare(Path(name))
        for file in shards(Path(name)):
            header(file)  # a damaged file is named, and no index leads out of the folder
    narrow = _narrow(Path(name), dtype, load_in_4bit) if held and torch.device(device).type == "cpu" else None
    more: dict[str, Any] = {"quantization_config": nf4(torch.float32 if narrow else dtype)} if load_in_4bit else {}
    if load_in_4bit or torch.device(device).type != "cpu":
        more["device_map"] = {"": str(device)}
    more |= {"local_files_only": True, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    try:
        with _without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=narrow or dtype, output_loading_info=True, **more)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ConfigError(f"the model in {name} could not be loaded: {_first_line(error)}{_consent(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        shown = ", ".join(missing[:5])
        raise ConfigError(f"the weights in {name} lack {len(missing)} tensors of the model ({shown}): is it complete?")
    model.requires_grad_(False).eval()
    if narrow:
        hold(model)
    return model


def _narrow(folder: Path, dtype: torch.dtype, load_in_4bit: bool) -> torch.dtype | None:
    """The 16 bits in which weights are held while a CPU computes in float32; None: everything is in `dtype`."""
    if dtype is torch.bfloat16:
        return None if native_bf16(torch.device("cpu"))[0] else dtype
    wanted = dtype is torch.float32 and not load_in_4bit and folder.is_dir()
    return stored if wanted and (stored := stored_in(folder)) in HALVES else None


def stored_in(folder: Path) -> torch.dtype | None:
    """The one dtype of the weights in a model folder; None where there are several."""
    kinds = {claim.dtype for _, _, claim in tensors(folder) if claim.dtype.startswith(("F", "BF"))}
    return FLOATS.get(kinds.pop()) if len(kinds) == 1 else None


def skeleton(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model as a shape without weights; only its config.json is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(name).expanduser()
    folder = path if (path / "config.json").is_file() else model_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'}: {_first_line(error)}") from error


def nf4(dtype: torch.dtype) -> Any:
    """NF4 with double quantisation. The compute dtype is said, because its default is float32."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cached(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        path = Path(name).expanduser()
        parent = path.parent
        siblings = sorted(f.name for f in parent.iterdir() if f.is_dir()) if parent.is_dir() else []
        near = nearest(path.name, siblings) or (f" Folders in {parent}: {', '.join(siblings[:8])}." if siblings else "")
        raise ConfigError(
            f"no model folder {name!r} is here, and no hub model of that name is in the local cache "
            f"({constants.HF_HUB_CACHE}). No network is used: download the model first, then give its folder.{near}"
        ) from None


def _no_config(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{str(path)!r} is an adapter folder, not a model. To start from its weights: --init_adapter {path}"
    inside = sorted(f.name for f in path.iterdir() if (f / "config.json").is_file())
    more = (
        f" Models inside it: {', '.join(inside[:8])}." if inside else " It should hold config.json and *.safetensors."
    )
    return f"model {str(path)!r} has no config.json.{more}"


def _consent(error: Exception) -> str:
    wants = "trust_remote_code" in str(error)
    return ". The folder brings its own code; run it with --trust_remote_code, if you trust it" if wants else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]

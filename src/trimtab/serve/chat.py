"""A conversation with a tuned model; the untuned one can answer for comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from trimtab.data import Renderer
from trimtab.errors import BadCheckpoint, ConfigError
from trimtab.export.merge import find_source
from trimtab.model import PeftModel
from trimtab.train.device import pick
from trimtab.train.load import load_model, load_tokenizer, model_folder

Show = Callable[[str], None]


class Chat:
    """The turns so far and the model that continues them. `tuned`: it carries an adapter, so `base` means something."""

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.renderer = model, renderer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.tuned = isinstance(model, PeftModel)
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self.opening)

    def reset(self) -> None:
        self.messages = list(self.opening)

    def ask(self, text: str, show: Show) -> str:
        """The answer to `text`, piece by piece to `show`; question and answer join the conversation."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._answer(asked, show)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def base(self, text: str, show: Show) -> str:
        """What the untuned model says to `text`, or, if that is empty, to the last question. Nothing is kept of it."""
        if not self.tuned:
            raise ConfigError("this is a plain model: there is no adapter to switch off")
        asked = [*self.messages, {"role": "user", "content": text}] if text else self._up_to_last_question()
        with self.model.disable_adapter():
            return self._answer(asked, show)

    def _up_to_last_question(self) -> list[dict[str, str]]:
        asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not asked:
            raise ConfigError("nothing was asked yet: /base QUESTION, or ask something first")
        return self.messages[: asked[-1] + 1]

    def _answer(self, messages: list[dict[str, str]], show: Show) -> str:
        ids = self.renderer.prompt_ids(messages)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and len(ids) >= limit:
            raise ConfigError(f"the talk has {len(ids):,} tokens, and the model reads {limit:,}: /reset begins anew")
        prompt = torch.tensor([ids], device=next(self.model.parameters()).device)
        warm = self.temperature > 0
        sampling = {"do_sample": warm} | ({"temperature": self.temperature} if warm else {})
        room = min(self.max_new_tokens, limit - len(ids)) if limit else self.max_new_tokens
        with torch.no_grad():
            out = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=room,
                pad_token_id=self.renderer.tokenizer.pad_token_id,
                eos_token_id=self.renderer.stop_token_ids,
                streamer=_Pieces(self.renderer.tokenizer, show),
                **sampling,
            )
        return self.renderer.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


class _Pieces(TextStreamer):
    """Text as soon as it is certain, without what ends a turn."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)


def open_chat(folder: str | Path, *, model: str | None = None, allow_pickle: bool = False, **settings: Any) -> Chat:
    """A chat with the adapter in `folder`, on the base it names (or `model`), or with a plain model folder."""
    path = Path(folder).expanduser()
    plain = (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
    return _plain(path, settings) if plain else _tuned(path, model, allow_pickle, settings)


def _plain(path: Path, settings: dict[str, Any]) -> Chat:
    hardware = pick("auto")
    loaded = load_model(model_folder(str(path)), dtype=hardware.dtype, device=hardware.device, held=True)
    return Chat(loaded, Renderer(load_tokenizer(path)), **settings)


def _tuned(path: Path, model: str | None, allow_pickle: bool, settings: dict[str, Any]) -> Chat:
    if not path.is_dir():
        raise BadCheckpoint(f"no adapter folder {str(path)!r} is here (looked in {Path.cwd()})")
    source = find_source(path, model)
    own = path if (path / "tokenizer_config.json").is_file() else source.base
    renderer = Renderer(load_tokenizer(own))
    device, four_bit = pick("auto").device, source.load_in_4bit
    base = load_model(source.base, dtype=source.dtype, device=device, load_in_4bit=four_bit, held=True)
    return Chat(PeftModel.from_pretrained(base, path, allow_pickle=allow_pickle), renderer, **settings)

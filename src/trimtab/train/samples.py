"""Answers to a few fixed prompts, before and after: whether a run changed what the model says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.data import Prepared, Renderer
from trimtab.files import write_text

ROWS = 3  # rows that are asked where the user gives no prompts
LENGTH = 64  # new tokens of an answer


@dataclass
class Sample:
    """A prompt, its answers, and the row's own answer where it has one."""

    prompt: str
    ids: list[int]
    expected: str | None = None
    before: str = ""
    after: str = ""


def choose(given: Sequence[str], data: Prepared, renderer: Renderer) -> list[Sample]:
    """The user's prompts, or those of the first rows held out (of the first rows, where none are)."""
    if given:
        return [Sample(text, renderer.prompt_ids([{"role": "user", "content": text}])) for text in given]
    found = []
    for row in (data.val_conversations or data.conversations)[:ROWS]:
        if row.text is not None:  # raw text: its first third, to be continued
            ids = renderer.tokenizer(row.text)["input_ids"]
            ids = ids[: max(1, min(len(ids) // 3, LENGTH))]
            found.append(Sample(renderer.tokenizer.decode(ids, skip_special_tokens=True), ids))
        elif row.prompt:
            found.append(
                Sample(row.prompt[-1]["content"] or "", renderer.prompt_ids(row.prompt, row.tools), row.answer)
            )
    return found


def answer(model: Any, ids: list[int], renderer: Renderer, length: int = LENGTH) -> str:
    """The greedy answer to a rendered prompt."""
    device, stops = next(model.parameters()).device, renderer.stop_token_ids
    prompt = torch.tensor([ids], device=device)
    settings = {"max_new_tokens": length, "do_sample": False, "eos_token_id": stops or None, "use_cache": True}
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=renderer.tokenizer.pad_token_id,
            **settings,
        )
    return renderer.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def answers(model: Any, samples: list[Sample], renderer: Renderer) -> list[str]:
    training = model.training
    model.eval()
    found = [answer(model, sample.ids, renderer) for sample in samples]
    model.train(training)
    return found


def write(samples: list[Sample], path: Path) -> None:
    lines = [{k: v for k, v in asdict(sample).items() if k != "ids"} for sample in samples]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def show(samples: list[Sample], console: Console) -> None:
    """Before and after, side by side."""
    table = Table(title="answers before and after", expand=True, show_lines=True, title_justify="left")
    for name, ratio in (("prompt", 2), ("before", 3), ("after", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for sample in samples:
        table.add_row(*(Text(_short(text)) for text in (sample.prompt, sample.before, sample.after)))
    console.print(table)


def _short(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"

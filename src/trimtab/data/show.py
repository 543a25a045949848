"""An example as a reader sees it: its text, with what is learnt set apart."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from trimtab.data.encode import Example

Piece = tuple[str, bool]  # text, supervised


def pieces(example: Example, tokenizer: Any) -> list[Piece]:
    """The decoded text in runs of supervised and masked tokens."""
    out: list[Piece] = []
    pairs = zip(example.input_ids, example.supervised, strict=True)
    for loss, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        out.append((tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), loss))
    return out


def shorten(shown: list[Piece], limit: int) -> list[Piece]:
    """At most about `limit` characters: the middle of long runs gives way, so that every edge stays in sight."""
    total = sum(len(text) for text, _ in shown)
    if total <= limit:
        return shown
    share = max(60, limit // max(1, len(shown)))
    return [
        (text if len(text) <= share else f"{text[: share // 2]} [... {len(text) - share:,} characters ...] "
         f"{text[-(share - share // 2):]}", loss)
        for text, loss in shown
    ]


def bracketed(shown: list[Piece]) -> str:
    """Without colours: what is learnt stands in [[ ]]."""
    return "".join(f"[[{text}]]" if loss else text for text, loss in shown)

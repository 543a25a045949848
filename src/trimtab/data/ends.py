"""Whether the model learns to stop: the token that ends an answer must be learnt in all rows but a few."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.data.encode import Example
from trimtab.data.ledger import PLACES, places
from trimtab.data.render import Renderer
from trimtab.errors import DataError

UNENDED_SHARE = 0.01
_BEHIND = 8  # learnt tokens among which the one that ends is looked for: a template may write a newline after it


def unended(examples: Sequence[Example], renderer: Renderer) -> list[Example]:
    """The examples whose last learnt run ends without a token at which generation stops."""
    stops = set(renderer.stop_token_ids)
    return [e for e in examples if not stops.intersection(_tail(e))]


def _tail(e: Example) -> list[int]:
    """The last few tokens of the last run that carries loss."""
    end = len(e.supervised)
    while end and not e.supervised[end - 1]:
        end -= 1
    start = end
    while start and end - start < _BEHIND and e.supervised[start - 1]:
        start -= 1
    return e.input_ids[start:end]


def check_ends(
    examples: Sequence[Example], renderer: Renderer, *, max_length: int, overlong: str, allowed: bool = False
) -> str:
    """A line that names the rows which teach no end, or "". Raises `DataError` where more than 1 % do so, unless `allowed`."""
    open_rows = unended(examples, renderer)
    if not open_rows:
        return ""
    line = told(open_rows, len(examples), renderer)
    if allowed or len(open_rows) <= UNENDED_SHARE * len(examples):
        return line
    cut = overlong == "truncate_end" and any(len(e.input_ids) == max_length for e in open_rows)
    fix = f"a max_length above {max_length:,}, or overlong: drop or truncate_prompt, which cut no answer" if cut else (
        "rows whose last turn is the assistant's, or a chat_template that ends its answers")
    raise DataError(f"{line}, which is more than {100 * UNENDED_SHARE:.0f} %: from them a model does not learn to stop.\n"
                    f"  Fix: {fix}. To train on answers without an end: --allow_unended")


def told(open_rows: Sequence[Example], of: int, renderer: Renderer) -> str:
    """The count and the first few places."""
    end = renderer.end_of_turn or renderer.tokenizer.eos_token
    first = places([f"{e.source}:{e.line}" for e in open_rows[:PLACES]], len(open_rows))
    return f"{len(open_rows):,} of {of:,} train rows do not end with a learnt {end} ({first})"

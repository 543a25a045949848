"""From renderings to token ids and their loss mask, each proven by decoding.

The text is tokenised once, with offsets, in bulk. A token is supervised if its characters lie in a span. The proof: the
supervised tokens of a span decode to exactly the span's text. Where a token reaches over the edge of a span (an answer
that begins with a space, say) the text is cut at the edges and the pieces are tokenised by themselves, which is what
happens when a model answers: its prompt is tokenised before the answer exists. What still cannot be proven is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trimtab.data.layout import Span


@dataclass(frozen=True)
class Rendering:
    """A text and the character spans of it that carry loss. `prompt` may be cut to shorten the example."""

    text: str
    spans: tuple[Span, ...]
    prompt: Span = (0, 0)
    bos: bool = False  # put the tokens that the tokenizer opens a text with before it
    eos: bool = False  # put a supervised eos behind it
    whole: bool = False  # every token carries loss


@dataclass(frozen=True)
class Example:
    """One training example: ids, which of them carry loss, and the row they came from."""

    input_ids: list[int]
    supervised: list[bool]
    source: str
    line: int
    prompt: Span = (0, 0)  # tokens of the prompt's content: what `overlong: truncate_prompt` may shorten

    @property
    def labels(self) -> list[int]:
        """The ids, with -100 where there is no loss. By position: a pad or eos id means nothing here."""
        return [token if loss else -100 for token, loss in zip(self.input_ids, self.supervised, strict=True)]


Encoded = tuple[list[int], list[bool], Span]


class Encoder:
    """Token ids and masks by one tokenizer. `seam`: cut every text at the edges of its spans (see `Renderer`)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.seam = False
        alone, dressed = self.ids("a"), list(tokenizer("a")["input_ids"])
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(alone)] == alone), 0)
        self.prefix: list[int] = dressed[:at]

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone; nothing is added to it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode(self, renderings: list[Rendering]) -> list[Encoded | str]:
        """One result a rendering: ids, mask and the prompt's tokens, or the reason why the mask cannot be proven."""
        if not renderings:
            return []
        if not self.tokenizer.is_fast:
            return [self._finish(r, self._proven(r, self._pieces(r), None)) for r in renderings]
        batch = self.tokenizer([r.text for r in renderings], add_special_tokens=False, return_offsets_mapping=True,
                               return_attention_mask=False)
        out: list[Encoded | str] = []
        jobs = []
        for r, ids, offsets in zip(renderings, batch["input_ids"], batch["offset_mapping"], strict=True):
            runs = [] if r.whole else [_run(span, offsets) for span in r.spans]
            jobs.append((r, ids, runs, _run(r.prompt, offsets)))
        decoded = iter(self._decode_all([ids[a:b] for _, ids, runs, _ in jobs for a, b in runs]))
        for r, ids, runs, prompt in jobs:
            agree = [next(decoded) == r.text[a:b] for (a, b), _ in zip(r.spans, runs, strict=False)]
            found: Encoded | str = (ids, _mask(len(ids), runs, r.whole), prompt)
            if not r.whole and (self.seam or not all(agree)):
                found = self._again(r, found, all(agree))
            out.append(self._finish(r, found))
        return out

    def _decode_all(self, runs: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(runs, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _again(self, r: Rendering, once: Encoded, agreed: bool) -> Encoded | str:
        """A second look at a text whose spans did not decode to themselves, or whose seams must be kept."""
        agreed = agreed or not isinstance(self._proven(r, once, None), str)
        if agreed and not self.seam:
            return once
        pieces = self._proven(r, self._pieces(r), self.decode(once[0]))
        return once if agreed and isinstance(pieces, str) else pieces

    def _pieces(self, r: Rendering) -> Encoded:
        edges = sorted({0, len(r.text), *(edge for span in r.spans for edge in span)})
        ids: list[int] = []
        mask: list[bool] = []
        prompt = (0, 0)
        for a, b in pairwise(edges):
            inside = r.whole or any(s <= a and b <= e for s, e in r.spans)
            if a <= r.prompt[0] <= r.prompt[1] <= b and r.prompt[1] > r.prompt[0]:
                head = len(ids) + len(self.ids(r.text[a : r.prompt[0]]))
                prompt = (head, len(ids) + len(self.ids(r.text[a : r.prompt[1]])))
            piece = self.ids(r.text[a:b])
            ids += piece
            mask += [inside] * len(piece)
        return ids, mask, prompt

    def _proven(self, r: Rendering, found: Encoded, whole: str | None) -> Encoded | str:
        """`found` if its supervised tokens decode to the spans, else the reason. All the ids must decode to `whole`."""
        ids, mask, _ = found
        if whole is not None and self.decode(ids) != whole:
            return "a token of this tokenizer reaches over the edge of the answer, and the text cannot be cut there"
        if r.whole:
            return found
        want = "".join(r.text[a:b] for a, b in r.spans)
        said = self.decode([token for token, loss in zip(ids, mask, strict=True) if loss])
        if said == want:
            return found
        if self.decode(ids) == r.text:
            # nothing is lost, but a decoder may drop the space a run begins with: look at the edges in place
            same = [self.decode(ids[:k]) for k in _edges(mask)] == [r.text[:at] for at in _merged(r.spans)]
        else:
            alone = "".join(self.decode(self.ids(r.text[a:b])) for a, b in r.spans)
            same = _squeeze(said) in (_squeeze(want), _squeeze(alone))
        return found if same else f"the supervised tokens read {_short(said)}, the assistant wrote {_short(want)}"

    def _finish(self, r: Rendering, found: Encoded | str) -> Encoded | str:
        """Open and close the text; refuse an opening token that then stands twice."""
        if isinstance(found, str):
            return found
        ids, mask, (a, b) = found
        eos = self.tokenizer.eos_token_id
        if r.bos and self.prefix and ids[: len(self.prefix)] != self.prefix:
            n = len(self.prefix)
            ids, mask, (a, b) = self.prefix + ids, [r.whole] * n + mask, (a + n, b + n)
        if r.eos and (not ids or ids[-1] != eos or not mask[-1]):
            ids, mask = [*ids, eos], [*mask, True]
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            return f"the text begins with {self.tokenizer.bos_token!r} twice: from the template and from the row"
        return ids, mask, (a, b)


def _run(span: Span, offsets: list[Span]) -> Span:
    """The tokens whose characters lie in the span, as one run. One without width (a trimmed space) lies at its end."""
    start, end = span
    if end <= start:
        return 0, 0
    low, high = 0, len(offsets)
    while low < high:  # ends never fall: bisect to the first token that reaches into the span
        middle = (low + high) // 2
        low, high = (middle + 1, high) if offsets[middle][1] <= start else (low, middle)
    first = low
    while first < len(offsets) and offsets[first][0] < start:
        first += 1
    last = first
    while last < len(offsets) and offsets[last][1] <= end:
        last += 1
    return first, last


def _edges(mask: list[bool]) -> list[int]:
    """The places where supervised runs begin and end."""
    padded = [False, *mask, False]
    return [i for i, (before, loss) in enumerate(pairwise(padded)) if before != loss]


def _merged(spans: tuple[Span, ...]) -> list[int]:
    """The edges of the spans; an edge at which the next span begins is none."""
    edges = [edge for span in spans for edge in span]
    return [edge for edge in edges if edges.count(edge) == 1]


def _mask(length: int, runs: list[Span], whole: bool) -> list[bool]:
    mask = [whole] * length
    for a, b in runs:
        mask[a:b] = [True] * (b - a)
    return mask


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}")

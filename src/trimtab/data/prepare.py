"""From files to examples that are ready to train on, with the account of what was read, kept and dropped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.data import cache
from trimtab.data.conversation import Conversation, conversations
from trimtab.data.encode import Example
from trimtab.data.ledger import Ledger, Split
from trimtab.data.problems import Problems
from trimtab.data.read import Rows, read
from trimtab.data.render import TRAIN_ON, Renderer, TrainOn
from trimtab.data.show import bracketed, pieces, shorten
from trimtab.errors import ConfigError, DataError, nearest

Overlong = Literal["drop", "truncate_prompt", "truncate_end", "error"]
OVERLONG = ("drop", "truncate_prompt", "truncate_end", "error")
UNSUPERVISED_SHARE = 0.01
_NOT_LEARNT = "no supervised token"
_BAD_LABEL = "label is false: an answer marked as bad is not learnt"


@dataclass(frozen=True)
class DataOptions:
    """What decides the examples beside files and renderer; part of the cache's key.

    overlong   what happens to examples longer than `max_length`:
               drop             leave them out (in the ledger)
               truncate_prompt  cut the begin of the user's text before the first answer; system, headers and answers
                                stay whole; dropped when that is not enough
               truncate_end     cut the end, which may lose the end-of-turn token or the whole answer
               error            refuse, naming the rows
    val_size   rows held out for validation, chosen by `seed` before anything else: a share below 1, or a number
    """

    max_length: int = 2048
    train_on: TrainOn = "assistant"
    overlong: Overlong = "drop"
    val_size: float = 0
    max_train_samples: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for name, allowed in (("train_on", TRAIN_ON), ("overlong", OVERLONG)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}.{nearest(value, allowed)}")
        if self.max_length < 2:
            raise ConfigError(f"max_length: {self.max_length} is too small; an example needs at least 2 tokens")
        if self.val_size < 0 or (self.val_size >= 1 and self.val_size != int(self.val_size)):
            raise ConfigError(f"val_size: {self.val_size} is neither a share below 1 nor a whole number of rows")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ConfigError(f"max_train_samples: {self.max_train_samples} must be at least 1")


@dataclass
class Prepared:
    """Examples, and the conversations they were made from, one for one. `formats`: a line for each file."""

    train: list[Example]
    val: list[Example]
    ledger: Ledger
    formats: list[str]
    conversations: list[Conversation]
    val_conversations: list[Conversation]


def prepare(
    sources: Sequence[str | Path],
    renderer: Renderer,
    *,
    val_sources: Sequence[str | Path] = (),
    val_size: float = 0,
    max_length: int = 2048,
    train_on: TrainOn = "assistant",
    overlong: Overlong = "drop",
    max_train_samples: int | None = None,
    seed: int = 42,
) -> Prepared:
    """Read, check, split, render, tokenise and account for the rows. The options are those of `DataOptions`.

    Raises `DataError` with every problem found; when more than 1 % of the rows would teach nothing (one is shown); and
    when nothing is left.
    """
    options = DataOptions(max_length, train_on, overlong, val_size, max_train_samples, seed)
    problems = Problems()
    rows = read(sources, problems)
    val_rows = read(val_sources, problems) if val_sources else Rows()
    train, val = conversations(rows, problems), conversations(val_rows, problems)
    problems.raise_any()
    files = [*rows.files, *val_rows.files]
    ledger = Ledger([{"path": f.name, "sha256": f.sha256, "rows": f.rows, "format": f.format} for f in files])
    train, held_out = _hold_out(train, options)
    val = held_out + val
    if max_train_samples is not None:
        ledger.unused = max(0, len(train) - max_train_samples)
        train = train[:max_train_samples]
    name = cache.key(
        files=ledger.files, val_files=len(val_rows.files), options=asdict(options), renderer=renderer.fingerprint)
    formats = [str(file) for file in files]
    if stored := cache.load(name):
        return _restore(stored, formats, train, val, renderer)
    parts, kept = _examples({"train": train, "val": val}, renderer, options, ledger)
    cache.save(name, parts, {"ledger": ledger.as_dict(), "kept": kept, "notices": renderer.notices})
    return Prepared(parts["train"], parts["val"], ledger, formats, [train[i] for i in kept["train"]],
                    [val[i] for i in kept["val"]])


def _restore(
    stored: tuple[cache.Parts, dict[str, Any]], formats: list[str], train: list[Conversation], val: list[Conversation],
    renderer: Renderer,
) -> Prepared:
    parts, about = stored
    for line in about["notices"]:
        renderer.notice(line)
    kept = about["kept"]
    return Prepared(parts["train"], parts["val"], Ledger.from_dict(about["ledger"]), formats,
                    [train[i] for i in kept["train"]], [val[i] for i in kept["val"]])


def _hold_out(rows: list[Conversation], options: DataOptions) -> tuple[list[Conversation], list[Conversation]]:
    if not options.val_size:
        return rows, []
    share = options.val_size < 1
    count = max(1, round(options.val_size * len(rows))) if share else int(options.val_size)
    if count >= len(rows):
        raise DataError(f"val_size: {count:,} rows held out of {len(rows):,} leave none to train on. "
                        "Fix: a smaller val_size, or more rows")
    chosen = set(random.Random(options.seed).sample(range(len(rows)), count))
    return ([row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen])


def _examples(
    rows: dict[str, list[Conversation]], renderer: Renderer, options: DataOptions, ledger: Ledger
) -> tuple[cache.Parts, dict[str, list[int]]]:
    """The examples of each part, and the index of the conversation each came from."""
    problems = Problems()
    splits = {"train": ledger.train, "val": ledger.val}
    good: dict[str, list[int]] = {}
    made: dict[str, list[Example]] = {}
    for part, split in splits.items():
        split.read = len(rows[part])
        good[part] = [i for i, row in enumerate(rows[part]) if row.label is not False]
        for row in rows[part]:
            if row.label is False:
                split.drop(_BAD_LABEL, row.source, row.line)
        made[part] = renderer.examples((rows[part][i] for i in good[part]), options.train_on, problems)
    problems.raise_any()
    parts: cache.Parts = {}
    kept: dict[str, list[int]] = {}
    for part, split in splits.items():
        pairs = [(i, _fit(e, options, split, problems)) for i, e in zip(good[part], made[part], strict=True)]
        empty = [e for _, e in pairs if e is not None and not any(e.supervised)]
        pairs = [(i, e) for i, e in pairs if e is not None and any(e.supervised)]
        for example in empty:
            split.drop(_NOT_LEARNT, example.source, example.line)
        kept[part], parts[part] = [i for i, _ in pairs], [e for _, e in pairs]
        split.keep(parts[part])
        split.rejected = sum(rows[part][i].rejected is not None for i in kept[part])
        problems.raise_any()
        if len(empty) > UNSUPERVISED_SHARE * (len(empty) + len(pairs)):
            raise DataError(_teaches_nothing(part, empty, len(empty) + len(pairs), renderer, options))
        if split.read and not pairs:
            raise DataError(_nothing_left(part, split, made[part], options))
    return parts, kept


def _fit(example: Example, options: DataOptions, split: Split, problems: Problems) -> Example | None:
    """The example within `max_length`, or None when it is dropped."""
    length, limit = len(example.input_ids), options.max_length
    if length <= limit:
        return example
    if options.overlong == "error":
        problems.add(example.source, example.line, "", f"{length:,} tokens, max_length is {limit:,}",
                     "raise max_length, or choose overlong: drop, truncate_prompt or truncate_end",
                     f"longer than max_length {limit:,}")
        return None
    reason = f"longer than max_length {limit:,}"
    if options.overlong == "truncate_end":
        split.truncated += 1
        return replace(example, input_ids=example.input_ids[:limit], supervised=example.supervised[:limit])
    if options.overlong == "truncate_prompt":
        a, b = example.prompt
        cut = length - limit
        if cut < b - a:  # at least one token of the prompt stays
            split.truncated += 1
            return replace(example, input_ids=example.input_ids[:a] + example.input_ids[a + cut :],
                           supervised=example.supervised[:a] + example.supervised[a + cut :], prompt=(a, b - cut))
        reason += ", and cutting the prompt is not enough"
    split.drop(reason, example.source, example.line)
    return None


def _teaches_nothing(part: str, empty: list[Example], of: int, renderer: Renderer, options: DataOptions) -> str:
    example = empty[0]
    if len(example.input_ids) >= options.max_length and options.overlong == "truncate_end":
        why = f"cut at max_length {options.max_length:,}, before any token that is learnt"
        fix = "raise max_length, or choose overlong: truncate_prompt or drop"
    else:
        why = f"none of its turns is learnt with train_on: {options.train_on} (turns marked train: false or weight: 0)"
        fix = "unmark the turns, remove the rows, or choose another train_on"
    shown = bracketed(shorten(pieces(example, renderer.tokenizer), 800))
    return (f"{len(empty):,} of {of:,} {part} rows have no supervised token, which is more than "
            f"{100 * UNSUPERVISED_SHARE:.0f} %.\n  {example.source}:{example.line}: {why}. Fix: {fix}\n"
            f"  It reads as follows; what is learnt would stand in [[ ]]:\n{shown}")


def _nothing_left(part: str, split: Split, made: list[Example], options: DataOptions) -> str:
    reasons = "; ".join(f"{d.rows:,} {reason} ({', '.join(d.places)})" for reason, d in split.dropped.items())
    shortest = min((len(e.input_ids) for e in made), default=0)
    fix = "add rows that can be learnt"
    if shortest > options.max_length:
        fix = f"max_length of at least {shortest:,} keeps the shortest row"
        fix += "; overlong: truncate_prompt shortens prompts" if options.overlong == "drop" else ""
    return f"no {part} row is left of {split.read:,}: {reasons}. Fix: {fix}"

"""What became of every row: read, kept, truncated, dropped and why. Nothing leaves the data unsaid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trimtab.data.encode import Example

PLACES = 5


@dataclass
class Dropped:
    """Rows dropped for one reason, and where the first few stand."""

    rows: int = 0
    places: list[str] = field(default_factory=list)


@dataclass
class Split:
    """The rows of the training or the validation part. `tokens` are those of the examples kept."""

    read: int = 0
    kept: int = 0
    truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    rejected: int = 0  # rejected answers of preference rows: read, and not learnt
    dropped: dict[str, Dropped] = field(default_factory=dict)

    def drop(self, reason: str, source: str, line: int) -> None:
        """Count a row out, under its reason."""
        dropped = self.dropped.setdefault(reason, Dropped())
        dropped.rows += 1
        if len(dropped.places) < PLACES:
            dropped.places.append(f"{source}:{line}")

    def keep(self, examples: Iterable[Example]) -> None:
        """Count the examples that are trained on."""
        for example in examples:
            self.kept += 1
            self.tokens += len(example.input_ids)
            self.supervised_tokens += sum(example.supervised)
            self.longest = max(self.longest, len(example.input_ids))


@dataclass
class Ledger:
    """The account of a data set; `as_dict` goes into `run.json`, `lines` to the terminal."""

    files: list[dict[str, Any]] = field(default_factory=list)  # path, sha256, rows, format
    train: Split = field(default_factory=Split)
    val: Split = field(default_factory=Split)
    unused: int = 0  # rows behind max_train_samples

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ledger:
        """The inverse of `as_dict`."""
        def split(name: str) -> Split:
            dropped = {reason: Dropped(**d) for reason, d in values[name]["dropped"].items()}
            kept: dict[str, Any] = values[name] | {"dropped": dropped}
            return Split(**kept)

        return cls(values["files"], split("train"), split("val"), values["unused"])

    def lines(self) -> list[str]:
        """A line for each part, and one for each reason for which rows were dropped."""
        out: list[str] = []
        for name, split in (("train", self.train), ("validation", self.val)):
            if split.read:
                out += _split_lines(name, split)
        if self.unused:
            out.append(f"not used: {self.unused:,} rows behind max_train_samples")
        return out


def _split_lines(name: str, split: Split) -> list[str]:
    dropped = sum(d.rows for d in split.dropped.values())
    counts = [f"{split.read:,} rows read", f"{split.kept:,} kept"]
    counts += [f"{split.truncated:,} truncated"] if split.truncated else []
    counts += [f"{dropped:,} dropped"] if dropped else []
    share = f" ({100 * split.supervised_tokens / split.tokens:.0f} %)" if split.tokens else ""
    lines = [f"{name}: {', '.join(counts)}; {split.tokens:,} tokens, {split.supervised_tokens:,} supervised{share}"]
    if split.rejected:
        lines.append(f"  {split.rejected:,} rejected answers of preference rows are not learnt, only the chosen ones")
    for reason, d in split.dropped.items():
        lines.append(f"  {d.rows:,} dropped: {reason}: {places(d.places, d.rows)}")
    return lines


def places(shown: Sequence[str], count: int) -> str:
    """`rows.jsonl:3, :17, ...`: the file's name once for places that follow each other in it."""
    out: list[str] = []
    before = ""
    for place in shown:
        source, _, line = place.rpartition(":")
        out.append(f":{line}" if source == before else place)
        before = source
    return ", ".join(out) + (", ..." if count > len(shown) else "")

"""The works of the bench: which rows, how long, how many for each contender, and the row makers of those that are made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import trimtab.demo

Row = dict[str, Any]

BANKING, INTENTS = "banking77_train.jsonl", "banking77_intents.json"
ALPACA, GSM8K = "alpaca_en_demo.json", "gsm8k_train.jsonl"
DEMO = Path(trimtab.demo.__file__).parent / "rows.jsonl"

LONG = 2000  # tokens of a long row
TURN = 8  # tokens that a template writes around one question and its answer, about


@dataclass(frozen=True)
class Work:
    """Rows and how they are trained on. `rows` says how many each contender gets: tokens/s do not depend on it, but
    who is slow needs no more, and who compiles first needs enough for that to count as it does in a real run: a file of
    rows once, or the part of it that takes some ten minutes."""

    name: str
    about: str
    files: tuple[str, ...]  # in the data folder
    rows: dict[str, int]  # contender, without its flags -> rows; only these take part
    max_length: int = 1024
    four_bit: bool = False
    micro_batches: tuple[int, ...] = (4, 8, 16)  # of peft_trainer
    trl_batch: int = 16  # trl_sft has no micro-batches; 16 padded rows with all their logits are too many for most
    check_batch: int = 16  # examples a step where losses are compared in float32


WORKS = {
    work.name: work
    for work in (
        Work(
            "short",
            "short messages and their intents (banking77)",
            (BANKING,),
            {"trimtab": 9984, "peft_trainer": 96, "tutorial": 16, "trl_sft": 96, "trl_packing": 96},
        ),
        Work(
            "alpaca",
            "instructions with long answers (alpaca_en_demo)",
            (ALPACA,),
            {"trimtab": 992, "peft_trainer": 32, "trl_sft": 32, "trl_packing": 32},
            trl_batch=4,
        ),
        Work(
            "shared",
            "the 77 intents in every instruction (banking77)",
            (BANKING, INTENTS),
            {"trimtab": 2400, "peft_trainer": 32, "trl_sft": 32, "trl_packing": 32},
            trl_batch=4,
        ),
        Work(
            "long",
            "2,000 tokens of gsm8k and alpaca turns, the last one learnt",
            (GSM8K, ALPACA),
            {"trimtab": 64, "peft_trainer": 16},
            max_length=4096,
            micro_batches=(1, 2),
            check_batch=2,
        ),
        Work(
            "short4bit",
            "short, on a 4-bit base",
            (BANKING,),
            {"trimtab": 4800, "peft_trainer": 96},
            four_bit=True,
        ),
        Work(
            "gsm8k",
            "word problems with worked answers (gsm8k_train)",
            (GSM8K,),
            {"trimtab": 1280, "peft_trainer": 32, "trl_packing": 32},
        ),
        Work(
            "demo",
            "the rows of trimtab demo",
            (),
            {"trimtab": 272, "peft_trainer": 128, "trl_sft": 128, "trl_packing": 128},
        ),
    )
}
DEFAULT = ("short", "alpaca", "shared", "long", "short4bit", "gsm8k")


@dataclass
class Rows:
    """The row files of the works: those of the data folder as they are, the others made once into `folder`."""

    data: Path
    folder: Path
    count: Callable[[str], int]  # tokens of a text
    made: dict[str, Path] = field(default_factory=dict)

    def missing(self, work: Work) -> list[str]:
        return [name for name in work.files if not (self.data / name).is_file()]

    def file(self, work: Work) -> Path:
        if work.name == "demo":
            return DEMO
        if work.name not in ("shared", "long"):
            return self.data / work.files[0]
        if work.name not in self.made:
            first, second = (read(self.data / name) for name in work.files)
            rows = shared_rows(first, second) if work.name == "shared" else long_rows(first, second, self.count)
            self.made[work.name] = write(rows, self.folder / f"{work.name}.jsonl")
        return self.made[work.name]


def shared_rows(rows: list[Row], intents: list[str]) -> list[Row]:
    """Each row with all the intents listed in its instruction: the instruction is the same in all, and long."""
    listed = f" The intents are: {', '.join(intents)}."
    return [row | {"instruction": row["instruction"] + listed} for row in rows]


def long_rows(first: list[Row], second: list[Row], count: Callable[[str], int], length: int = LONG) -> list[Row]:
    """Conversations of about `length` tokens: questions and answers, in turn from the two, until the next would not
    bring a row nearer to it. The last ones, where they do not fill a row, are left out."""
    found: list[Row] = []
    messages: list[Row] = []
    total = 0
    for row in in_turn(first, second):
        turns = as_messages(row)
        tokens = TURN + sum(count(turn["content"]) for turn in turns)
        if messages and total + tokens / 2 > length:
            found.append({"messages": messages})
            messages, total = [], 0
        messages, total = messages + turns, total + tokens
    return found


def in_turn(first: list[Row], second: list[Row]) -> Iterator[Row]:
    """One of each, until the shorter list ends; then the rest of the other."""
    pairs = zip_longest(first, second)
    return (row for row in chain.from_iterable(pairs) if row is not None)


def as_messages(row: Row) -> list[Row]:
    """A question and its answer as two messages, whichever of the two formats a row has."""
    if "messages" in row:
        return row["messages"]
    asked = "\n".join(text for text in (row.get("instruction"), row.get("input")) if text)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def read(path: Path) -> list[Any]:
    """A JSON list, or one value a line. Split on \\n alone: splitlines() would cut rows that contain U+2028."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(r) for r in text.split("\n") if r.strip()]


def write(rows: list[Row], path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path

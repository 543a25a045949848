"""From files to examples: what is kept, cut, dropped and held out, the account of it, and the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.data import Ledger, Prepared, Renderer, collate, prepare
from trimtab.data import cache as cache_module
from trimtab.data.problems import BadRows
from trimtab.errors import ConfigError, DataError

from . import tiny
from .tiny import learnt, write


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", *({"instruction": f"q{i}", "output": f"a{i}"} for i in range(20)))


def run(*sources: Path, template: str = tiny.CHATML, **options: Any) -> Prepared:
    return prepare(sources, Renderer(tiny.tokenizer(template)), **options)


def answers(examples: list[Any]) -> list[str]:
    return ["".join(learnt(e, tiny.tokenizer())).replace("<|im_end|>", "") for e in examples]


def lines(examples: list[Any]) -> list[int]:
    return [example.line for example in examples]


def test_everything_in_order_and_accounted_for(file: Path) -> None:
    data = run(file)
    assert answers(data.train) == [f"a{i}" for i in range(20)] and lines(data.train) == list(range(1, 21))
    assert data.formats == [f"{file}: 20 rows, alpaca (instruction, output)"]
    train = data.ledger.train
    assert (train.read, train.kept, train.truncated, train.dropped) == (20, 20, 0, {})
    assert train.tokens == sum(len(e.input_ids) for e in data.train)
    assert train.supervised_tokens == sum(sum(e.supervised) for e in data.train) == 10 * 3 + 10 * 4
    assert data.ledger.files[0]["rows"] == 20 and len(data.ledger.files[0]["sha256"]) == 64
    again = json.loads(json.dumps(data.ledger.as_dict()))
    assert Ledger.from_dict(again) == data.ledger
    assert [c.answer for c in data.conversations] == answers(data.train)


def test_max_train_samples_takes_the_first_rows(file: Path) -> None:
    data = run(file, max_train_samples=7)
    assert lines(data.train) == list(range(1, 8)) and data.ledger.unused == 13
    assert data.ledger.lines()[-1] == "not used: 13 rows behind max_train_samples"


def test_val_size_holds_rows_out_by_seed(file: Path) -> None:
    data = run(file, val_size=0.2)
    assert len(data.val) == 4 and sorted(lines(data.train) + lines(data.val)) == list(range(1, 21))
    assert lines(data.train) == sorted(lines(data.train))
    assert lines(run(file, val_size=4).val) == lines(data.val)
    assert lines(run(file, val_size=4, seed=1).val) != lines(data.val)
    assert lines(run(file, val_size=4, max_train_samples=2).val) == lines(data.val)
    with pytest.raises(DataError, match="20 rows held out of 20 leave none"):
        run(file, val_size=20)


def test_validation_files(file: Path, tmp_path: Path) -> None:
    data = run(file, val_sources=[write(tmp_path / "val.jsonl", {"prompt": "p", "completion": "c"})])
    assert answers(data.val) == ["c"] and data.ledger.val.kept == 1 and len(data.train) == 20


def long_rows(tmp_path: Path) -> Path:
    return write(
        tmp_path / "long.jsonl",
        {"instruction": "short", "output": "yes"},
        {"instruction": "x" * 60 + "tail", "output": "yes", "system": "sys"},
        {"instruction": "q", "output": "y" * 80},
    )


def test_overlong_rows_are_dropped_and_named(tmp_path: Path) -> None:
    data = run(long_rows(tmp_path), max_length=64)
    assert lines(data.train) == [1]
    (reason, dropped), = data.ledger.train.dropped.items()
    assert reason == "longer than max_length 64" and dropped.rows == 2
    assert data.ledger.lines()[1].endswith("2 dropped: longer than max_length 64: "
                                           f"{tmp_path}/long.jsonl:2, :3")


def test_truncate_prompt_keeps_system_headers_and_answer(tmp_path: Path) -> None:
    data = run(long_rows(tmp_path), max_length=64, overlong="truncate_prompt")
    assert lines(data.train) == [1, 2] and data.ledger.train.truncated == 1
    text = tiny.tokenizer().decode(data.train[1].input_ids)
    assert text.startswith("<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nx")
    assert text.endswith("xtail<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
    assert len(data.train[1].input_ids) == 64
    assert "cutting the prompt is not enough" in next(iter(data.ledger.train.dropped))


def test_truncate_end(tmp_path: Path) -> None:
    data = run(write(tmp_path / "rows.jsonl", {"instruction": "q", "output": "y" * 80}), max_length=64,
               overlong="truncate_end")
    assert len(data.train[0].input_ids) == 64 and set(answers(data.train)[0]) == {"y"}
    assert data.ledger.train.truncated == 1


def test_overlong_error_names_every_row(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match="max_length is 64") as error:
        run(long_rows(tmp_path), max_length=64, overlong="error")
    assert [p.line for p in error.value.problems] == [2, 3]


def test_only_overlong_rows(file: Path) -> None:
    with pytest.raises(DataError, match=r"no train row is left of 20: 20 longer than max_length 5") as error:
        run(file, max_length=5)
    shortest = min(len(e.input_ids) for e in run(file).train)
    assert f"max_length of at least {shortest} keeps the shortest row" in str(error.value)


def test_rows_that_teach_nothing_are_an_error_that_shows_one(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"instruction": "q", "output": "a"},
                 {"instruction": "x" * 100, "output": "lost"})
    with pytest.raises(DataError) as error:
        run(file, max_length=64, overlong="truncate_end")
    said = str(error.value)
    assert said.startswith("1 of 2 train rows have no supervised token, which is more than 1 %")
    assert f"{file}:2: cut at max_length 64, before any token that is learnt" in said
    assert "<|im_start|>user\nxxx" in said


def test_up_to_one_percent_are_dropped_and_counted(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]}
    spoken = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data = run(write(tmp_path / "rows.jsonl", *[spoken] * 50, silent, *[spoken] * 60))
    assert data.ledger.train.dropped["no supervised token"].places == [f"{tmp_path}/rows.jsonl:51"]
    assert len(data.train) == 110


def test_answers_marked_as_bad_are_not_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"c{i}", "label": i != 1} for i in range(3)]
    data = run(write(tmp_path / "rows.jsonl", *rows))
    assert answers(data.train) == ["c0", "c2"]
    assert [c.answer for c in data.conversations] == ["c0", "c2"]
    assert data.ledger.lines()[1].strip().startswith("1 dropped: label is false")


def test_rejected_answers_are_counted(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(3)]
    data = run(write(tmp_path / "pairs.jsonl", *pairs))
    assert answers(data.train) == ["good"] * 3 and data.ledger.train.rejected == 3
    assert data.ledger.lines()[1] == "  3 rejected answers of preference rows are not learnt, only the chosen ones"
    assert Ledger.from_dict(data.ledger.as_dict()) == data.ledger


def test_problems_of_reading_and_of_rows_come_together(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"instruction": "a"}, "{broken", {"instruction": "a", "output": ""})
    with pytest.raises(BadRows) as error:
        run(file, val_sources=[tmp_path / "none.jsonl"])
    found = [(Path(p.source).name, p.line) for p in error.value.problems]
    assert found == [("rows.jsonl", 1), ("rows.jsonl", 2), ("rows.jsonl", 3), ("none.jsonl", 0)]


def test_what_the_template_refuses_is_reported_for_every_row(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "system": "s"}, {"instruction": "a", "output": "b"}]
    with pytest.raises(BadRows, match="System role not supported") as error:
        run(write(tmp_path / "rows.jsonl", *rows, rows[0]), template=tiny.STRICT)
    assert [p.line for p in error.value.problems] == [1, 3]


@pytest.mark.parametrize(
    "options", [{"val_size": -1}, {"val_size": 1.5}, {"max_length": 1}, {"overlong": "cut"}, {"train_on": "user"},
                {"max_train_samples": 0}])
def test_options_that_cannot_be_right(file: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        run(file, **options)


# the cache

def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what is rendered anew."""
    calls: list[int] = []
    render = Renderer.examples

    def counted(self: Renderer, *args: Any, **options: Any) -> Any:
        out = render(self, *args, **options)
        calls.append(len(out))
        return out

    monkeypatch.setattr(Renderer, "examples", counted)
    return calls


def test_the_cache_returns_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = made(monkeypatch)
    first, second = run(file, val_size=3), run(file, val_size=3)
    assert first == second and calls == [17, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda file: {"max_length": 100},
        lambda file: {"train_on": "last"},
        lambda file: {"template": tiny.SYSTEM_DEFAULT},
        lambda file: {"max_train_samples": 5},
        lambda file: write(file, *({"instruction": f"q{i}", "output": f"b{i}"} for i in range(20))) and {},
    ],
)
def test_any_change_misses_the_cache(
    file: Path, change: Callable[[Path], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = made(monkeypatch)
    before = run(file)
    after = run(file, **change(file))
    assert len(calls) == 4 and before.ledger.files and after.train


def test_new_code_and_another_tokenizer_miss_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = made(monkeypatch)
    run(file)
    monkeypatch.setattr(cache_module, "_code", lambda: "0.0.2")
    run(file)
    prepare([file], Renderer(tiny.tokenizer(eos_token="<|return|>")))
    assert len(calls) == 6


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b[:50] + b"\xff" + b[51:], lambda b: b""])
def test_a_damaged_cache_is_made_anew(
    file: Path, cache_folder: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = made(monkeypatch)
    first = run(file)
    (stored,) = cache_folder.iterdir()
    stored.write_bytes(damage(stored.read_bytes()))
    assert run(file) == first == run(file)
    assert calls == [20, 0, 20, 0] and [p.suffix for p in cache_folder.iterdir()] == [".safetensors"]


def test_a_cache_that_cannot_be_written_stops_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "taken"))
    assert len(run(file).train) == 20


def test_collate_pads_by_position(file: Path) -> None:
    tok = tiny.tokenizer(eos_token="<|im_end|>", pad_token="<|im_end|>")
    data = prepare([file], Renderer(tok))
    short, long = data.train[0], data.train[-1]
    batch = collate([short, long], tok.pad_token_id)
    n, m = len(short.input_ids), len(long.input_ids)
    assert n < m and batch["input_ids"].shape == (2, m) and batch["input_ids"].dtype == torch.long
    assert batch["input_ids"][0].tolist() == short.input_ids + [tok.pad_token_id] * (m - n)
    assert batch["attention_mask"].sum(1).tolist() == [n, m]
    assert batch["labels"][0].tolist() == short.labels + [-100] * (m - n)
    assert tok.pad_token_id in batch["labels"][0].tolist(), "the end of the turn is learnt, though it is the pad token"

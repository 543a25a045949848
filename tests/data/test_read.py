"""Rows know their line, whatever the file; what cannot be read is said with its place, all at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data import Rows, read
from trimtab.errors import DataError

from .tiny import write

ROW = {"instruction": "say", "output": "yes"}


def lines(rows: Rows) -> list[int]:
    return [row.line for row in rows]


def refusal(*paths: Path) -> str:
    with pytest.raises(DataError) as error:
        read(paths)
    return str(error.value)


def test_jsonl_lines_are_physical_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROW, "", {**ROW, "output": "a\u2028b\x85c"}, "   ", ROW)
    rows = read([file])
    assert lines(rows) == [1, 3, 5]
    assert rows[1].fields["output"] == "a\u2028b\x85c"
    assert str(rows.files[0]) == f"{file}: 3 rows, alpaca (instruction, output)"
    assert rows.files[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_crlf_and_byte_order_mark(tmp_path: Path, name: str) -> None:
    texts = {
        "rows.jsonl": f"{json.dumps(ROW)}\r\n{json.dumps(ROW)}\r\n",
        "rows.json": f"[\r\n{json.dumps(ROW)},\r\n{json.dumps(ROW)}\r\n]\r\n",
        "rows.csv": "instruction,output\r\nsay,yes\r\nsay,yes\r\n",
    }
    file = tmp_path / name
    file.write_bytes(b"\xef\xbb\xbf" + texts[name].encode())
    rows = read([file])
    assert [row.fields for row in rows] == [ROW, ROW]
    assert lines(rows) == {"rows.jsonl": [1, 2], "rows.json": [2, 3], "rows.csv": [2, 3]}[name]


def test_an_array_gives_the_line_on_which_a_row_opens(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ROW, ROW, ROW], indent=1))
    assert lines(read([file])) == [2, 6, 10]
    file.write_text(json.dumps([ROW, ROW]))
    assert [(row.source, row.line) for row in read([file])] == [(str(file), 1), (f"{file}[1]", 1)]


def test_csv_cells_over_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('instruction,output\nsay,"two\nlines, ""quoted"""\n\nsay,yes\n')
    rows = read([file])
    assert lines(rows) == [2, 5]
    assert rows[0].fields["output"] == 'two\nlines, "quoted"'


def test_parquet_rows_are_numbered_and_nulls_are_absent(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{**ROW, "messages": None}, {**ROW, "messages": None}]), file)
    rows = read([file])
    assert lines(rows) == [1, 2] and rows.files[0].format == "alpaca"


def test_json_lines_in_json_and_an_array_in_jsonl(tmp_path: Path) -> None:
    assert len(read([write(tmp_path / "lines.json", ROW, ROW)])) == 2
    assert lines(read([write(tmp_path / "array.jsonl", [ROW, {**ROW, "input": "x"}])])) == [1, 1]


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ROW)
    write(tmp_path / "a.jsonl", {**ROW, "output": "first"})
    write(tmp_path / ".hidden.jsonl", "nonsense")
    write(tmp_path / "dataset_info.json", "{}")
    (tmp_path / "README.md").write_text("about")
    rows = read([tmp_path])
    assert [row.fields["output"] for row in rows] == ["first", "yes"]
    assert [Path(file.name).name for file in rows.files] == ["a.jsonl", "b.jsonl"]


def test_a_folder_that_mixes_training_and_held_out_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW)
    write(tmp_path / "validation.jsonl", ROW)
    assert "rows held out (validation.jsonl)" in refusal(tmp_path)


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "holds no .jsonl, .json, .csv or .parquet file; found model.safetensors" in refusal(tmp_path)


def test_bad_json_on_line_7(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *[ROW] * 6, '{"instruction": "say", "output": "yes"', ROW)
    said = refusal(file)
    assert f"{file}:7: not JSON: Expecting ',' delimiter at column 39. Fix: each line must be one" in said


def test_a_broken_array(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[\n{"text": "a"},\n{"text": b},\n{"text": "c"}\n]')
    assert f"{file}:3: not JSON: Expecting value at column 10" in refusal(file)
    file.write_text('[\n{"text": "a"}\n{"text": "c"}\n]')
    assert f"{file}:3: not JSON: a comma is missing" in refusal(file)
    file.write_text('[\n{"text": "a"},\n')
    assert f"{file}:3: not JSON: the array is not closed" in refusal(file)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"text": NaN}', "NaN is not JSON"),
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice"),
        ('["a"]', "a row must be an object, found list"),
        ('{"text": ' + "9" * 5000 + "}", "a number of thousands of digits"),
        ('{"text": "a\\ud800b"}', "half of a surrogate pair"),
        ('"a"', "a row must be an object, found str"),
    ],
)
def test_json_that_cannot_be_trusted(tmp_path: Path, line: str, cause: str) -> None:
    file = write(tmp_path / "rows.jsonl", {"text": "a"}, line)
    assert f"{file}:2: {cause}" in refusal(file)
    file.write_text(f'[{{"text": "a"}},\n{line}]', encoding="utf-8")
    assert f"{file}:2: {cause}" in refusal(file)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    assert read([write(tmp_path / "rows.jsonl", '{"text": "\\ud83d\\ude00"}')])[0].fields["text"] == "\U0001f600"


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\x80\x02\x00\x01")
    (tmp_path / "b.jsonl").write_bytes(json.dumps(ROW).encode("utf-16"))
    (tmp_path / "c.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n\xff\n")
    (tmp_path / "d.parquet").write_bytes(b"PAR0")
    (tmp_path / "e.jsonl").write_bytes(b"")
    (tmp_path / "f.txt").write_text("some text")
    (tmp_path / "g.json").write_text("[]")
    said = refusal(*sorted(tmp_path.iterdir()), tmp_path / "e.json")
    for line in (
        "a.jsonl: a binary file (byte 0 at offset 2), not text",
        "b.jsonl: the file is UTF-16",
        "c.jsonl:2: not UTF-8: byte 0xff",
        "d.parquet: not a parquet file",
        "e.jsonl: the file holds no rows",
        "f.txt: .txt: not a data file",
        "g.json: the file holds no rows",
        "e.json: no such file or folder (near it: e.jsonl)",
    ):
        assert line in said
    assert said.startswith("8 problems in the data in 8 files:")


def test_csv_rows_of_another_length(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("instruction,output\nsay,yes,no\nsay,yes\n")
    assert f"{file}:2: 3 cells, the header has 2" in refusal(file)


def test_a_hub_data_set_is_looked_for_in_the_local_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    said = refusal(Path("someone/rows"))
    assert "no network is used" in said and str(tmp_path / "datasets" / "someone___rows") in said
    snapshot = tmp_path / "hub" / "datasets--someone--rows" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(snapshot / "train.jsonl", ROW)
    write(snapshot / "test.jsonl", {**ROW, "output": "held out"})
    assert [row.source for row in read(["someone/rows"])] == ["someone/rows/train.jsonl"]


@pytest.mark.parametrize("prepared", [False, True])
def test_of_a_hub_data_set_one_revision_and_one_configuration_is_read(
    prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = tmp_path / "hub" / "datasets--someone--rows"
    inside = tmp_path / "datasets" / "someone___rows" if prepared else hub / "snapshots"
    for revision in ("aaa", "bbb"):
        for split in ("train", "test"):
            (inside / revision / "main" / split).mkdir(parents=True)
            write(inside / revision / "main" / split / "0000.jsonl", {**ROW, "output": f"{revision} {split}"})
    assert "several configurations or revisions are in the local cache: aaa/main, bbb/main" in refusal(Path("someone/rows"))
    if prepared:
        return
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("bbb")
    found = read(["someone/rows"])
    assert [row.source for row in found] == ["someone/rows/main/train/0000.jsonl"]
    assert "bbb train" in str(found[0])
    (inside / "bbb" / "main" / "train" / "0000.jsonl").unlink()
    assert "only rows that are held out are in the local cache" in refusal(Path("someone/rows"))
    write(inside / "bbb" / "main" / "rows.jsonl", ROW)
    assert [row.source for row in read(["someone/rows"])] == ["someone/rows/main/rows.jsonl"]


def test_two_formats_in_one_file(tmp_path: Path) -> None:
    other = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write(tmp_path / "rows.jsonl", ROW, ROW, other, ROW)
    assert f"{file}:3: two formats in one file: line 1 is alpaca, line 3 is messages" in refusal(file)


def test_problems_are_collected_and_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *["nonsense"] * 30, ROW)
    said = refusal(file)
    assert said.startswith("30 problems in the data:") and f"{file}:20:" in said and f"{file}:21:" not in said
    assert said.endswith("and 10 more:\n    10 x not JSON")

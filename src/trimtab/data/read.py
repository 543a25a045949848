"""From data files to rows that know their file and line.

Lines are what a text editor shows: JSON Lines are cut at "\\n" only (U+2028 inside a string is not a line end), a row
of a JSON array has the line on which it opens, a CSV row the line on which it begins, a Parquet row its number.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.data.formats import describe, detect
from trimtab.data.problems import Problems
from trimtab.data.sources import find

MOST = 50_000_000  # rows of one Parquet file
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


@dataclass(slots=True)
class Row:
    """One row as it stands in its file; `format` is set once its file's format is known."""

    source: str
    line: int
    fields: dict[str, Any]
    format: str = ""


@dataclass
class File:
    """What one file held. `str()` is the line that tells the user what was detected."""

    name: str
    sha256: str
    rows: int
    format: str
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.rows:,} row{'' if self.rows == 1 else 's'}, {describe(self.format, self.columns)}"


@dataclass
class Rows:
    """The rows of all files in order, and what was detected for each file."""

    rows: list[Row] = field(default_factory=list)
    files: list[File] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def read(sources: Sequence[str | Path], problems: Problems | None = None) -> Rows:
    """Read every row of the files and folders named, and detect the format of each file.

    Raises `DataError` with all problems found (unreadable files, broken lines, formats mixed in one file), unless a
    collector is given: then they are added to it, and the rows that could be read are returned.
    """
    collected = problems if problems is not None else Problems()
    out = Rows()
    for name, path in find(sources, collected):
        before = len(collected.found)
        data = path.read_bytes()
        rows = _parse(name, path, data, collected)
        if not rows and len(collected.found) == before:
            collected.add(name, 0, "", "the file holds no rows", "check that it was written completely", "empty file")
        format, columns = detect(rows, collected)
        out.rows += rows
        out.files.append(File(name, hashlib.sha256(data).hexdigest(), len(rows), format, columns))
    if problems is None:
        collected.raise_any()
    return out


def _parse(name: str, path: Path, data: bytes, problems: Problems) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        return _table(name, path, data, problems)
    text = _decode(name, data, problems)
    if text is None:
        return []
    if suffix == ".csv":
        return list(_csv(name, text, problems))
    # the suffix is a habit, the first character is a fact: arrays are found in .jsonl files and lines in .json files
    if text.lstrip(_SPACE).startswith("["):
        return list(_json_array(name, text, problems))
    return list(_json_lines(name, text, problems))


def _decode(name: str, data: bytes, problems: Problems) -> str | None:
    """UTF-8, with or without a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        problems.add(name, 0, "", "the file is UTF-16", f"save it as UTF-8: iconv -f UTF-16 -t UTF-8 {name} > new file",
                     "not UTF-8")
        return None
    if (at := data.find(b"\0")) >= 0:
        problems.add(name, 0, "", f"a binary file (byte 0 at offset {at:,}), not text",
                     "name a text file in UTF-8, or give a Parquet file its suffix .parquet", "binary file")
        return None
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.add(name, line, "", f"not UTF-8: byte 0x{error.object[error.start]:02x}", "save the file as UTF-8",
                     "not UTF-8")
        return None


class _Refused(ValueError):
    """JSON that Python's decoder would let pass: NaN, Infinity, a key that stands twice."""


def _refuse_constant(word: str) -> Any:
    raise _Refused(f"{word} is not JSON", "write null or leave the field out")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"the key {twice!r} stands twice in one object", "keep one of them")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_twice, parse_constant=_refuse_constant)


def broken_text(value: Any, raw: str) -> bool:
    """Half of a surrogate pair somewhere in `value`, which was written as `raw`: no character, and no tokenizer takes it."""
    if "\\ud" not in raw and "\\uD" not in raw:
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _json_lines(name: str, text: str, problems: Problems) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(_SPACE)
        if not line:
            continue
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            if line == "{":
                problems.add(name, number, "", "a JSON object over several lines",
                             "one object a line, or a JSON array [...] of objects", "not JSON Lines")
                return
            problems.add(name, number, "", f"not JSON: {error.msg} at column {error.colno}",
                         "each line must be one complete JSON object", "not JSON")
        except (ValueError, RecursionError) as error:
            _add_refused(name, number, error, problems)
        else:
            if row := _object(name, number, value, line, problems):
                yield row


def _json_array(name: str, text: str, problems: Problems) -> Iterator[Row]:
    """The elements of one JSON array, each with the line on which it opens. A syntax error ends the file."""
    at, counted, line = text.index("[") + 1, 0, 1
    need_comma, element, last_line = False, 0, 0
    while True:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        line += text.count("\n", counted, at)
        counted = at
        sign = text[at : at + 1]
        if sign == "]":
            break
        if need_comma and sign == ",":
            need_comma, at = False, at + 1
            continue
        if need_comma or not sign:
            what = "a comma is missing before this element" if sign else "the array is not closed: the file ends early"
            return problems.add(name, line, "", f"not JSON: {what}", "repair the file at this line", "not JSON")
        begin = at
        try:
            value, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            where = line + text.count("\n", counted, error.pos)
            return problems.add(name, where, "", f"not JSON: {error.msg} at column {error.colno}",
                                f"repair the element that opens on line {line}", "not JSON")
        except (ValueError, RecursionError) as error:
            return _add_refused(name, line, error, problems)
        need_comma = True
        # several elements on one line: the line alone would not tell which, so the number of the element joins the name
        if row := _object(f"{name}[{element}]" if line == last_line else name, line, value, text[begin:at], problems):
            yield row
        element, last_line = element + 1, line
    if text[at + 1 :].strip(_SPACE):
        problems.add(name, line, "", "text after the closing ] of the array", "one array a file", "not JSON")


def _add_refused(name: str, line: int, error: Exception, problems: Problems) -> None:
    cause, fix = "a number of thousands of digits", "write it in quotes"
    if isinstance(error, _Refused):
        cause, fix = error.args
    elif isinstance(error, RecursionError):
        cause, fix = "nested too deeply", "flatten the row"
    problems.add(name, line, "", cause, fix, "JSON that cannot be trusted")


def _object(name: str, line: int, value: Any, raw: str, problems: Problems) -> Row | None:
    if broken_text(value, raw):
        problems.add(name, line, "", "half of a surrogate pair (\\ud800 to \\udfff), which is no character",
                     "write the whole character, or take it out", "text that is no Unicode")
        return None
    if isinstance(value, dict):
        return Row(name, line, value)
    problems.add(name, line, "", f"a row must be an object, found {type(value).__name__}",
                 'write rows like {"instruction": ..., "output": ...}', "a row that is not an object")
    return None


def _csv(name: str, text: str, problems: Problems) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than one long document
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    begin = 1
    try:
        for record in reader:
            line, begin = begin, reader.line_num + 1
            if not any(record):
                continue
            if not columns:
                columns = [column.strip() for column in record]
                if len(set(columns)) < len(columns):
                    return problems.add(name, line, "", "a column name stands twice", "rename one", "CSV header")
            elif len(record) != len(columns):
                problems.add(name, line, "", f"{len(record)} cells, the header has {len(columns)}",
                             "quote cells that hold commas or line ends", "CSV row of another length")
            else:
                yield Row(name, line, dict(zip(columns, record, strict=True)))
    except csv.Error as error:
        problems.add(name, begin, "", f"not CSV: {error}", 'quote cells with ", and write " inside them as ""',
                     "not CSV")


def _table(name: str, path: Path, data: bytes, problems: Problems) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".arrow":
            table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        else:
            claimed = pq.ParquetFile(pa.BufferReader(data)).metadata.num_rows
            if claimed > MOST:  # a few bytes can stand for any number of equal rows
                problems.add(name, 0, "", f"claims {claimed:,} rows; {MOST:,} are read from one file", "split the file")
                return []
            table = pq.read_table(pa.BufferReader(data))
        rows: list[dict[str, Any]] = table.to_pylist()
    except Exception as error:  # pyarrow's own, and those of text that is no UTF-8 and of dates that are none
        problems.add(name, 0, "", f"not a {path.suffix[1:]} file: {str(error)[:300]}", "write it again, or fix its suffix",
                     "not a Parquet file")
        return []
    return [Row(name, number, fields) for number, fields in enumerate(rows, 1)]

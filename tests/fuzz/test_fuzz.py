"""Files of strangers: a bounded search, the same in each run, for one that crashes, hangs or shows a traceback."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from inputs import FILES
from readers import CONFIG, READERS, framed, safetensors

from trimtab.data import sandbox

CASES = {"adapter_config": 150, "template": 150}  # they build a model, compile a program
SAME_EACH_TIME = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
SLOWEST = 20.0  # seconds of one case


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    monkeypatch.setattr(sandbox, "SIZE", 2**20)


@pytest.mark.parametrize("kind", READERS)
def test_it_is_read_or_refused(kind: str) -> None:
    @settings(SAME_EACH_TIME, max_examples=CASES.get(kind, 200))
    @given(st.data())
    def look(data: st.DataObject) -> None:
        file = data.draw(FILES[kind])
        started = time.process_time()
        READERS[kind](file)
        assert time.process_time() - started < SLOWEST

    look()


TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LIES = {
    "ten terabytes": ({"a": TENSOR | {"shape": [10**6, 2_500_000], "data_offsets": [0, 10**13]}}, "bytes"),
    "more by shape": ({"a": TENSOR | {"shape": [10**9, 10**9]}}, "by its shape"),
    "overflow": ({"a": TENSOR | {"shape": [2**62, 4]}}, "by its shape"),
    "overlapping": ({"a": TENSOR, "b": TENSOR}, "overlaps"),
    "a gap": ({"a": TENSOR, "b": TENSOR | {"data_offsets": [20, 36]}}, "gap"),
    "negative": ({"a": TENSOR | {"data_offsets": [-16, 0]}}, "at"),
    "backwards": ({"a": TENSOR | {"data_offsets": [16, 0]}}, "by its offsets"),
    "negative shape": ({"a": TENSOR | {"shape": [-2, -2]}}, "shape"),
    "a list": ([TENSOR], "object"),
    "no dtype": ({"a": TENSOR | {"dtype": "PICKLE"}}, "dtype"),
    "data behind it": ({"a": TENSOR | {"shape": [2], "data_offsets": [0, 8]}}, "the file has"),
    "twice": (b'{"a":' + json.dumps(TENSOR).encode() + b',"a":' + json.dumps(TENSOR).encode() + b"}", "twice"),
    "deep": (b'{"a":' + b"[" * 100_000, "JSON"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(name: str) -> None:
    header, word = LIES[name]
    message = safetensors(framed(header, bytes(16)))
    assert message is not None and "damaged or cut off" in message and word in message, message


def test_a_file_with_holes_is_not_allocated(tmp_path: Path) -> None:
    from trimtab import store
    from trimtab.errors import BadCheckpoint

    size = 2**43
    data = framed({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    with (tmp_path / store.WEIGHTS_FILE).open("wb") as file:
        file.write(data)
        try:
            file.truncate(len(data) + size)
        except OSError:  # this disk makes no holes of that size: what is too large is refused all the same
            file.truncate(len(data))
    with pytest.raises(BadCheckpoint, match=r"this machine has|damaged"):
        store.read(tmp_path)


CONFIGS = {
    "rank": ({"r": 10**9}, "far more than its file holds"),
    "rank by pattern": ({"rank_pattern": {"q_proj": 10**9}}, "far more than its file holds"),
    "rank as text": ({"r": "8"}, "no value of that option"),
    "rank as a list": ({"r": [8]}, "no value of that option"),
    "not a number": ({"lora_alpha": float("nan")}, "no value of that option"),
    "a slow pattern": ({"target_modules": "(a+)+$"}, "take for ever"),
    "a slow exclusion": ({"exclude_modules": "(.*a|b)*c"}, "take for ever"),
    "a slow rank": ({"rank_pattern": {"(x+x+)+y": 4}}, "take for ever"),
    "a long pattern": ({"target_modules": "q" * 3000}, "are allowed"),
    "many repeats": ({"target_modules": ".*" * 9 + "x"}, "open-ended"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_asks_too_much_is_refused(name: str) -> None:
    change, word = CONFIGS[name]
    message = READERS["adapter_config"](json.dumps(CONFIG | change).encode())
    assert message is not None and word in message, message


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(q|v)_proj", r"model\.layers\.([0-9]|1[0-9])\..*(attn|mlp).*_proj$",
     r"(?:.*?(?:vision).*?(?:attn).*?)|(?:\bmodel\.[\d]{1,}\.(q|v))"],
)  # fmt: skip
def test_patterns_as_people_write_them_pass(pattern: str) -> None:
    from trimtab.typed import endless

    assert endless(pattern) == ""


@pytest.mark.parametrize("entry", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x", "C:\\x"])
def test_an_index_does_not_lead_out_of_its_folder(entry: str) -> None:
    message = READERS["index"](json.dumps({"weight_map": {"a": entry}}).encode())
    assert message is not None and "outside of the folder" in message


def test_text_of_a_table_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xe8a")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "rows.parquet")
    message = READERS["parquet"]((tmp_path / "rows.parquet").read_bytes())
    assert message is not None and "not a parquet file" in message


def test_a_table_of_too_many_rows_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trimtab.data import read

    pq.write_table(pa.table({"text": pa.array(["a"] * 100_000).dictionary_encode()}), tmp_path / "rows.parquet")
    data = (tmp_path / "rows.parquet").read_bytes()
    assert len(data) < 5_000 and READERS["parquet"](data) is None
    monkeypatch.setattr(sys.modules[read.__module__], "MOST", 99_999)
    message = READERS["parquet"](data)
    assert message is not None and "claims 100,000 rows" in message


def test_yaml_bombs_are_refused() -> None:
    laughs = "\n".join(["a: &a [x, x]", *(f"{c}: &{c} [*{p}, *{p}]" for p, c in zip("abcdefghi", "bcdefghij", strict=True))])
    message = READERS["yaml"](laughs.encode())
    assert message is not None and "aliases" in message
    message = READERS["yaml"](b"seed: " + b"9" * 5000)
    assert message is not None and "run.yaml:1" in message
    message = READERS["yaml"](b"r: " + b"[" * 50_000)
    assert message is not None
    message = READERS["yaml"](b"#" * 2_000_000)
    assert message is not None and "bytes" in message

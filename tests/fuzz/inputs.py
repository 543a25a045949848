"""What the readers are fed: well-formed files with odd values, and well-made files with bytes turned over."""

from __future__ import annotations

import io
import json
from typing import Any

from hypothesis import strategies as st
from readers import CONFIG, TALK, framed

NAMES = st.sampled_from(
    "instruction input output system history messages conversations tools role content from value train weight prompt "
    "completion chosen rejected text label tool_calls function name arguments".split()
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | NAMES
    | st.sampled_from([10**30, -1, 0, 1e308, "user", "assistant", "\ud7ff", "\u2028", "9" * 50, "[", "{", "null", "."])
)  # fmt: skip
VALUES: Any = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)
ROW = st.dictionaries(NAMES, VALUES, max_size=5)
GOOD: list[dict[str, Any]] = [
    {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]]},
    {"messages": TALK, "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"text": "a"},
]


@st.composite
def changed(draw: Any, files: st.SearchStrategy[bytes]) -> bytes:
    """A file with a few bytes cut out, put in or turned over."""
    data = bytearray(draw(files))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 2))
        if kind == 0:
            del data[at : at + draw(st.integers(1, 20))]
        elif kind == 1:
            data[at:at] = draw(st.binary(max_size=8))
        elif at < len(data):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _json(value: Any) -> bytes:
    return _bytes(json.dumps(value, ensure_ascii=False))


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), out)
    except Exception:  # values of two types in a column
        pq.write_table(pa.table({"text": ["a"]}), out)
    return out.getvalue()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    columns = list(rows[0]) if rows else []
    lines = [",".join(columns), *(",".join(str(row.get(c, "")) for c in columns) for row in rows)]
    return _bytes("\n".join(lines))


def _like(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A row of one format, as it should be or with an odd value in it."""
    odd = st.dictionaries(st.sampled_from(list(good)) | NAMES, VALUES, max_size=1)
    return st.just(good) | odd.map(lambda values: good | values)


_ROWS = st.sampled_from(GOOD).flatmap(lambda good: st.lists(_like(good), max_size=5)) | st.lists(ROW, max_size=3)
_KEYS = st.sampled_from(
    "model dataset output_dir learning_rate r lora_alpha target_modules adapter seed batch_size warmup_steps lora_r val_size "
    "sample_prompts adapter_options gradient_accumulation_steps micro_batch_size max_steps rank_pattern load_in_4bit".split()
)
_YAML_VALUES = st.sampled_from(
    ["1", "1e-4", "2001-99-99", "9" * 5000, "!!binary x", "!!timestamp x", "!!bool x", "!!int x", "!!set {a}", "!!omap [a: b]",
     "[a, b]", "{a: 1}", "~", "*x", "&x [*x]", "=", "<<", ".nan", "-.inf", "'", "|", "1:99", "0x",
     "!!python/object:os.system x",
     "[[[[[[", "? a", "{a: {b: [c]}}", "true", "[1, [2, {3: 4}]]", "a: b", "lora", "%", "\t", "\u2028", "{? [a] : b}"]
)  # fmt: skip
_LINE = st.tuples(_KEYS | st.text(max_size=6), _YAML_VALUES | st.text(max_size=12)).map(": ".join)
_FIELDS = st.sampled_from(
    "peft_type r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern modules_to_save rank_pattern "
    "alpha_pattern bias task_type init_lora_weights use_dora use_rslora fan_in_fan_out lora_dropout auto_mapping revision "
    "target_parameters trainable_token_indices layer_replication base_model_name_or_path inference_mode num_virtual_tokens "
    "feedforward_modules d_initial projection_prng_key oft_block_size n_frequency vector_length num_vectors topk".split()
)
_METHODS = ["LORA", "IA3", "VERA", "OFT", "LOHA", "LOKR", "HRA", "FOURIERFT", "VBLORA", "PREFIX_TUNING",
"PROMPT_TUNING", "BOFT",
            "C3A", "MISS", "SHIRA", "RANDLORA", "ROAD", "LN_TUNING", "os", "", "../x"]  # fmt: skip
_ODD = st.sampled_from(
    [0, -1, 10**9, 10**30, 2.5, "q_proj", ["q_proj"], ["q_proj", "v_proj"], ".*", "(a+)+$", "(", "all-linear", [], {},
     {"q_proj": 3}, {"q_proj": -1}, {"(": 1}, {".*": 10**9}, ["lm_head"], ["nothing"], [""], "", "../../x",
     None, True, [0], [99], [-1],
     "SEQ_CLS", "all", "lora_only", "gaussian", "pissa", 8, 16.0, 1e9, "x" * 3000, {"rho": 1}, [[0, 1]]]
)  # fmt: skip
_CONFIGS = st.tuples(st.sampled_from(_METHODS[:1] * 20 + _METHODS), st.dictionaries(_FIELDS, _ODD | VALUES, max_size=4)).map(
    lambda pair: CONFIG | {"peft_type": pair[0]} | pair[1]
)
_CLAIM = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "BOOL", "F4", "F8_E4M3", "U64", "X", ""]) | SCALARS,
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([10**13, 2**63, 2**64, 1.0, None]), max_size=3) | SCALARS,
        "data_offsets": st.lists(st.integers(-4, 64) | st.sampled_from([10**13, 2**64]), max_size=3) | SCALARS,
    }
)
_GOOD_WEIGHTS = framed(
    {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
     "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}, bytes(range(22)),
)  # fmt: skip
_HEADERS = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), _CLAIM | VALUES, max_size=3)
_WEIGHTS = st.just(_GOOD_WEIGHTS) | st.tuples(_HEADERS, st.binary(max_size=64)).map(lambda p: framed(_json(p[0]), p[1]))
_PATHS = st.sampled_from(["a.safetensors", "../x", "/etc/passwd", "..\\x", "C:\\x", "", ".", "a/../../x", "\0", "a" * 5000])
_MAPS = st.dictionaries(st.text(max_size=4), _PATHS | st.text(max_size=9), max_size=3)
_PIECES = st.sampled_from(
    ["{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m.role }}", "{% if ", "%}", "{{ ", " }}", "loop.last",
     "m['x']", "{% set x = ", "messages", " ~ ", " * ", " ** ", "9999999999", "'x'", "{% macro f(a) %}",
     "{% endmacro %}", "{{ f(f) }}",
     "range(99999)", "| tojson", "| join", "| center(99999999)", "| replace('', 'xx')", "| list", "| string",
     "{% endif %}", "{% break %}",
     "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% block b %}", "{% generation %}",
     "{% endgeneration %}", "<end>",
     "[", "]", "(", ")", "{{ ''.__class__ }}", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}",
     "{#", "#}", "namespace(a=1)", "loop.cycle",
     ".format(1)", "'{:99999999}'", " % ", "add_generation_prompt", " and ", " else ",
     "{% for a in range(99999) %}", " recursive",
     "{{ loop(m) }}", " if "]
)  # fmt: skip

FILES: dict[str, st.SearchStrategy[bytes]] = {
    "jsonl": changed(_ROWS.map(lambda rows: b"\n".join(map(_json, rows)))),
    "json": changed(_ROWS.map(_json) | VALUES.map(_json)),
    "csv": changed(_ROWS.map(_csv)),
    "parquet": changed(_ROWS.map(_parquet)),
    "yaml": changed(st.lists(_LINE | st.text(max_size=20), max_size=6).map(lambda lines: _bytes("\n".join(lines)))),
    "adapter_config": changed(_CONFIGS.map(_json)) | _CONFIGS.map(_json) | VALUES.map(_json),
    "safetensors": changed(_WEIGHTS) | _WEIGHTS,
    "index": changed(_MAPS.map(lambda m: _json({"weight_map": m}))) | VALUES.map(_json),
    "template": st.lists(_PIECES | st.text(max_size=6), max_size=14).map(lambda pieces: _bytes("".join(pieces))),
}

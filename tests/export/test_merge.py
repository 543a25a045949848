"""A merged folder is a plain model that says what the adapter says, or nothing is written."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.errors import ConfigError, NotMergeable
from trimtab.export import merge as module
from trimtab.export import stream
from trimtab.export.merge import MergeReport, dense_base, find_source, merge
from trimtab.model import PeftModel
from trimtab.train import load

NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def merged(adapter: Path, out: Path, **over: Any) -> tuple[MergeReport, str]:
    said = io.StringIO()
    return merge(adapter, out, console=Console(file=said, width=300), **over), said.getvalue()


def answers(model: Any, tokenizer: Any) -> list[str]:
    found = []
    for i in range(10):
        turn = [{"role": "user", "content": f"row {i}"}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
    return found


def test_a_merged_model_is_plain_and_says_the_same(tuned: Any, tmp_path: Path) -> None:
    adapter = tuned()
    report, said = merged(adapter, tmp_path / "out")
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert {"merge_report.json", "README.md"} <= names
    assert not any("adapter" in name for name in names)
    assert report.difference.relative < 1e-5 and report.difference.agreement == 1
    assert report.difference.probes == 7 and "verified" in said
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tuned_model: Any = PeftModel.from_pretrained(load.load_model(report.base, dtype=torch.float32), str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert answers(plain, tokenizer) == answers(tuned_model.eval(), tokenizer)
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["difference"]["maximum"] == report.difference.maximum


def test_the_sum_is_rounded_once(tuned: Any, tmp_path: Path) -> None:
    adapter = tuned()
    merged(adapter, tmp_path / "wide")
    report, _ = merged(adapter, tmp_path / "narrow", dtype="bfloat16")
    wide, narrow = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("wide", "narrow"))
    assert report.dtype == "bfloat16"
    for name, w in wide.items():
        assert narrow[name].dtype == torch.bfloat16 and torch.equal(narrow[name], w.bfloat16()), name


def test_another_base_is_found_out_and_nothing_is_written(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(source: Any) -> Any:
        model = dense_base(source)
        model.get_submodule("model.layers.0.mlp.up_proj").weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(module, "dense_base", other)
    with pytest.raises(NotMergeable, match="the merged model is not the adapter"):
        merged(tuned(), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_a_folder_in_use_is_refused(tuned: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merged(tuned(), tmp_path)


def test_what_cannot_be_written_is_known_before_a_model_is_loaded(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tuned()
    monkeypatch.setattr(load, "load_model", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir .* cannot be written: a file is in the way\. Fix: "):
        merged(adapter, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match=r"'bfloat' is not one of auto, .*\. Did you mean 'bfloat16'\?"):
        merged(adapter, tmp_path / "out", dtype="bfloat")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_samples_may_hold_any_character(tuned: Any, tmp_path: Path) -> None:
    """U+2028 ends a line for Python's `splitlines`, and not in a JSON line."""
    adapter = Path(shutil.copytree(tuned(), tmp_path / "adapter"))
    line = json.dumps({"prompt": "a\u2028b", "after": "c\u0085d"}, ensure_ascii=False)
    (adapter / "samples.jsonl").write_text(line + "\n", encoding="utf-8")
    report, _ = merged(adapter, tmp_path / "out")
    assert report.difference.probes == 5
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {0o644}


@NF4
def test_a_4_bit_run_merges_into_the_weights_it_was_trained_on(tuned: Any, tmp_path: Path) -> None:
    adapter = tuned(load_in_4bit=True)
    source = find_source(adapter)
    assert source.load_in_4bit and source.dtype is torch.float32
    dense, original = dense_base(source), load.load_model(source.base, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    apart = (dense.state_dict()[name] - original.state_dict()[name]).abs().max()
    assert 1e-4 < apart < 0.1
    assert torch.equal(dense.state_dict()["lm_head.weight"], original.state_dict()["lm_head.weight"])
    report, _ = merged(adapter, tmp_path / "out")
    assert report.load_in_4bit and report.difference.relative < 1e-2 and report.difference.agreement > 0.97


def stored_as(adapter: Path, place: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """The adapter and its base, with the base stored in `dtype`."""
    base = Path(shutil.copytree(find_source(adapter).base, place / "base"))
    load.load_model(base, dtype=dtype).save_pretrained(base)
    own = Path(shutil.copytree(adapter, place / "own"))
    (own / "trimtab.json").unlink()
    return own, base


def test_shard_by_shard_is_the_same_as_whole(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, base = stored_as(tuned(), tmp_path, torch.bfloat16)
    whole: Any = PeftModel.from_pretrained(load.load_model(base, dtype=torch.float32), str(own))
    want = whole.merge_and_unload().bfloat16().state_dict()
    monkeypatch.setattr(stream, "SHARD", 10_000)
    held: list[int] = []
    flush = stream._Shards.flush
    monkeypatch.setattr(stream._Shards, "flush", lambda self: (held.append(self.size), flush(self)))
    report, _ = merged(own, tmp_path / "out", model=str(base), dtype="bfloat16")
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert report.shard_by_shard and len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    largest = max(t.numel() * 2 for t in want.values())
    assert max(held) <= max(10_000, largest)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.config.architectures == ["LlamaForCausalLM"] and plain.dtype == torch.bfloat16
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in want.items())
    assert report.difference.relative < report.tolerance == 4e-2


def test_the_layers_that_are_written_are_let_go(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tuned()
    model: Any = PeftModel.from_pretrained(dense_base(find_source(adapter)), str(adapter))
    base = model.get_base_model()
    monkeypatch.setattr(stream, "SHARD", 10_000)
    assert stream.write(model, find_source(adapter).base, torch.float32, tmp_path / "out")
    left = {n for n, p in base.named_parameters() if p.device.type != "meta"}
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not [m for m in base.modules() if hasattr(m, "adapters")]


def test_names_that_differ_in_the_files_are_merged_whole(tuned: Any, tmp_path: Path) -> None:
    adapter = tuned()
    source = find_source(adapter)
    model: Any = PeftModel.from_pretrained(dense_base(source), str(adapter))
    model.get_base_model().extra = torch.nn.Linear(2, 2)
    assert not stream.write(model, source.base, torch.float32, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_card_says_how_near_it_is(tuned: Any, tmp_path: Path) -> None:
    report, _ = merged(tuned(), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| {report.difference.probes} | {report.difference.positions:,} |" in text and "| 0.01 % | 100.0 % |" in text
    )


def test_float32_for_the_time_of_a_layer_is_float32(tuned: Any, tmp_path: Path) -> None:
    own, base = stored_as(tuned(), tmp_path, torch.bfloat16)
    bases = [load.load_model(base, dtype=d) for d in (torch.bfloat16, torch.float32)]
    models: list[Any] = [PeftModel.from_pretrained(b, str(own)).eval() for b in bases]
    ids = torch.arange(12).view(1, 12)
    before = {k: v.clone() for k, v in models[0].state_dict().items()}
    with torch.no_grad(), stream.in_float32(models[0]):
        near = models[0](input_ids=ids).logits
    with torch.no_grad():
        assert torch.allclose(near, models[1](input_ids=ids).logits, atol=1e-5) and near.dtype == torch.float32
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in models[0].state_dict().items())

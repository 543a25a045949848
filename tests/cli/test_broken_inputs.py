"""What goes wrong on a first day. Each ends with exit code 2, a message with the place and the fix, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROW = {"input": "hello", "output": "red"}


@dataclass
class Place:
    """Where a case plays: a folder of its own, and what is shared."""

    path: Path
    model: Path
    adapter: Path

    def write(self, name: str, *lines: object, end: str = "\n") -> Path:
        file = self.path / name
        text = end.join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        file.write_bytes((text + end).encode())
        return file

    def train(self, data: Path, *more: str) -> list[str]:
        out = [] if any(m.startswith("--output_dir") for m in more) else ["--output_dir", str(self.path / "out")]
        out += ["--max_steps", "1"]
        model = [] if any(m.startswith("--model") for m in more) else ["--model", str(self.model)]
        return ["train", str(data), *out, *model, *more]

    def broken_adapter(self) -> Path:
        return Path(shutil.copytree(self.adapter, self.path / "adapter"))


Case = Callable[[Place], list[str]]


def bad_json(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", *[ROW] * 6, '{"input": "x", "output": }', ROW))


def missing_field(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW, {"input": "no answer"}))


def empty_answer(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW, {"input": "x", "output": ""}))


def only_overlong(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW, ROW), "--max_length", "8")


def unknown_role(p: Place) -> list[str]:
    turns = [{"role": "narrator", "content": "once"}, {"role": "assistant", "content": "yes"}]
    return p.train(p.write("rows.jsonl", {"messages": turns}))


def byte_order_mark(p: Place) -> list[str]:
    (p.path / "rows.jsonl").write_bytes(("\ufeff" + json.dumps(ROW) + "\n").encode("utf-16-le"))
    return p.train(p.path / "rows.jsonl")


def byte_order_mark_of_utf_8(p: Place) -> list[str]:
    """No problem in itself: see below. What is wrong behind it has its place."""
    return p.train(p.write("rows.jsonl", "\ufeff" + json.dumps({"input": "x", "output": ""}), ROW))


def carriage_returns(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW, '{"input": "x", "output": "y"', ROW, end="\r\n"))


def a_directory(p: Place) -> list[str]:
    (p.path / "rows").mkdir()
    return p.train(p.path / "rows")


def binary(p: Place) -> list[str]:
    (p.path / "rows.jsonl").write_bytes(bytes(range(256)) * 8)
    return p.train(p.path / "rows.jsonl")


def empty_file(p: Place) -> list[str]:
    (p.path / "rows.jsonl").touch()
    return p.train(p.path / "rows.jsonl")


def two_formats(p: Place) -> list[str]:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return p.train(p.write("rows.jsonl", ROW, {"messages": turns}))


def misspelt_option(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), "--lerning_rate", "1e-4")


def misspelt_in_yaml(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), "--config", str(p.write("run.yaml", "seed: 1", "max_lenght: 12")))


def wrong_target(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), "--target_modules", "q_prj")


def missing_model(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), f"--model={p.model.with_name('tiny-lama')}")


def other_model(p: Place) -> list[str]:
    adapter = p.broken_adapter()
    config = json.loads((p.model / "config.json").read_text())
    other = Path(shutil.copytree(p.model, p.path / "other"))
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    weights = load_file(other / "model.safetensors")
    wide = {k: torch.zeros([96 if n == 48 else n for n in v.shape]) for k, v in weights.items()}
    save_file(wide, other / "model.safetensors", {"format": "pt"})
    return ["merge", str(adapter), "--output_dir", str(p.path / "out"), "--model", str(other)]


def truncated(p: Place) -> list[str]:
    file = p.broken_adapter() / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return ["merge", str(file.parent), "--output_dir", str(p.path / "out")]


def truncated_start(p: Place) -> list[str]:
    file = p.broken_adapter() / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return p.train(p.write("rows.jsonl", ROW), "--init_adapter", str(file.parent))


def a_pickle(p: Place) -> list[str]:
    folder = p.broken_adapter()
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")
    return ["chat", str(folder)]


def unwritable(p: Place) -> list[str]:
    p.write("out", "a file stands where the folder would be")
    return p.train(p.write("rows.jsonl", ROW))


def negative_rate(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), "--learning_rate", "-1e-4")


def unknown_adapter(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), "--adapter", "lorra")


def no_adapter_there(p: Place) -> list[str]:
    return ["chat", str(p.path / "nothing")]


def missing_rows(p: Place) -> list[str]:
    p.write("rows.json", ROW)
    return p.train(p.path / "rows.jsonl")


def into_a_model(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), f"--output_dir={shutil.copytree(p.model, p.path / 'model')}")


def into_a_folder_of_rows(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW).parent, f"--output_dir={p.path}")


def over_its_own_rows(p: Place) -> list[str]:
    return p.train(p.write("metrics.jsonl", ROW), f"--output_dir={p.path}")


def a_model_with_an_adapter_in_it(p: Place) -> list[str]:
    model = Path(shutil.copytree(p.model, p.path / "model"))
    shutil.copy(p.adapter / "adapter_config.json", model)
    return p.train(p.write("rows.jsonl", ROW), f"--model={model}")


def unknown_logger(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), "--report_to", "tensorbord")


def optimizer_of_a_missing_package(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW), "--optim", "adamw_torch_xla")


def half_a_character(p: Place) -> list[str]:
    return p.train(p.write("rows.jsonl", ROW, '{"input": "x", "output": "a\\udfff"}'))


def a_base_that_moved(p: Place) -> list[str]:
    adapter = p.broken_adapter()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/moved/away"}))
    return ["doctor", str(adapter)]


CASES: list[tuple[Case, list[str]]] = [
    (bad_json, ["rows.jsonl:7", "JSON"]),
    (missing_field, ["rows.jsonl:2", "output"]),
    (empty_answer, ["rows.jsonl:2", "output", "empty"]),
    (only_overlong, ["max_length", "rows.jsonl:1", "keeps the shortest row"]),
    (unknown_role, ["rows.jsonl:1", "narrator"]),
    (byte_order_mark, ["rows.jsonl", "UTF-16", "save it as UTF-8"]),
    (byte_order_mark_of_utf_8, ["rows.jsonl:1", "output", "empty"]),
    (carriage_returns, ["rows.jsonl:2", "JSON"]),
    (a_directory, ["rows", "holds no .jsonl", "name the folder of the files"]),
    (binary, ["rows.jsonl", "binary file", "UTF-8"]),
    (empty_file, ["rows.jsonl", "no rows", "written completely"]),
    (two_formats, ["rows.jsonl:2", "line 1 is alpaca, line 2 is messages", "split the file"]),
    (misspelt_option, ["--lerning_rate", "Did you mean 'learning_rate'?"]),
    (misspelt_in_yaml, ["run.yaml:2", "Did you mean 'max_length'?"]),
    (wrong_target, ["q_prj", "Did you mean 'q_proj'?", "trimtab sites"]),
    (missing_model, ["tiny-lama", "tiny-llama"]),
    (other_model, ["adapter", "meets another base", "intermediate_size 48 there, 96 here", "Fix: load it on the base"]),
    (truncated, ["adapter_model.safetensors", "damaged", "copy it again"]),
    (truncated_start, ["adapter_model.safetensors", "damaged", "copy it again"]),
    (a_pickle, ["adapter_model.bin", "pickle", "safetensors"]),
    (unwritable, ["output_dir", "out", "a file is in the way", "choose another folder"]),
    (negative_rate, ["learning_rate is -0.0001", "above 0", "2e-4"]),
    (unknown_adapter, ["lorra", "Did you mean 'lora'?"]),
    (no_adapter_there, ["nothing", "no adapter folder"]),
    (into_a_model, ["output_dir", "holds a model", "choose another folder"]),
    (into_a_folder_of_rows, ["output_dir", "is a folder of rows", "choose another one"]),
    (over_its_own_rows, ["metrics.jsonl", "have the name of a file that is written", "rename them"]),
    (a_model_with_an_adapter_in_it, ["holds a model and an adapter", "a folder of their own"]),
    (unknown_logger, ["report_to 'tensorbord'", "Did you mean 'tensorboard'?"]),
    (optimizer_of_a_missing_package, ["optim adamw_torch_xla is not to be had here", "torch_xla"]),
    (half_a_character, ["rows.jsonl:2", "half of a surrogate pair", "take it out"]),
    (a_base_that_moved, ["/moved/away", "If it lies elsewhere now: --model FOLDER"]),
    (missing_rows, ["rows.jsonl", "no such file", "near it: rows.json", "check the path"]),
]


@pytest.mark.parametrize(("case", "words"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_it_ends_with_the_place_and_the_fix(
    case: Case, words: list[str], tmp_path: Path, model: Path, adapter: Path, run: Callable
) -> None:
    args = case(Place(tmp_path, model, adapter))
    before = everything(tmp_path)
    result = run(*args, stdin="hello\n")
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "error: " in result.stderr and "Traceback" not in result.output
    assert [w for w in words if w not in result.stderr] == [], result.stderr
    assert everything(tmp_path) == before


def test_a_full_disk_is_said_where_a_library_has_its_own_exception(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapter: Path, run: Callable
) -> None:
    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    result = run("merge", adapter, "--output_dir", tmp_path / "merged")
    assert result.exit_code == 2 and "error: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_crlf_are_no_problem(
    tmp_path: Path, model: Path, run: Callable, mark: str, end: str
) -> None:
    file = Place(tmp_path, model, model).write("rows.jsonl", mark + json.dumps(ROW), ROW, end=end)
    result = run("data", "check", file, "--model", model)
    assert result.exit_code == 0, result.output
    assert "2 rows read, 2 kept" in result.output


def test_a_pickle_is_read_where_it_is_trusted(tmp_path: Path, model: Path, adapter: Path, run: Callable) -> None:
    place = Place(tmp_path, model, adapter)
    folder = place.broken_adapter()
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    rows = place.write("rows.jsonl", *[ROW] * 4)
    assert run(*place.train(rows, "--init_adapter", str(folder))).exit_code == 2
    done = run(*place.train(rows, "--init_adapter", str(folder), "--allow_pickle"))
    assert done.exit_code == 0, done.output + str(done.exception)
    merged = run("merge", folder, "--output_dir", tmp_path / "merged", "--allow_pickle")
    assert merged.exit_code == 0, merged.output + str(merged.exception)
    talk = run("chat", folder, "--allow_pickle", "--max_new_tokens", "2", stdin="hello\n")
    assert talk.exit_code == 0, talk.output + str(talk.exception)


def test_many_problems_are_shown_together(tmp_path: Path, model: Path, run: Callable) -> None:
    file = Place(tmp_path, model, model).write("rows.jsonl", ROW, "red", ROW, {"input": "x"}, "[]")
    result = run("data", "check", file, "--model", model)
    assert result.exit_code == 2
    assert all(f"rows.jsonl:{line}" in result.stderr for line in (2, 4, 5))


def test_ctrl_c_is_tidy(monkeypatch: pytest.MonkeyPatch, model: Path, rows: Path, run: Callable) -> None:
    import trimtab.data

    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trimtab.data, "check", interrupted)
    result = run("data", "check", rows, "--model", model)
    assert (result.exit_code, result.stderr) == (130, "stopped\n")

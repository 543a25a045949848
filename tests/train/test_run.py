"""A whole run, from rows to the folder, and what stops it before anything is written."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from trimtab.errors import ConfigError, TrainingError
from trimtab.train.options import TrainOptions
from trimtab.train.run import RunResult, run

FIELDS = (
    "status model adapter steps examples_seen tokens_seen tokens_computed supervised_tokens train_seconds "
    "tokens_per_second peak_memory_bytes first_loss final_loss trainable_parameters seed versions data"
)


def options(folder: Path, rows: Path, out: Path, **over: Any) -> TrainOptions:
    given: dict[str, Any] = dict(
        model=str(folder),
        dataset=[str(rows)],
        output_dir=str(out),
        batch_size=8,
        max_steps=6,
        learning_rate=1e-2,
        dtype="float32",
        val_size=8,
    )
    return TrainOptions(**given | over)


def ran(options: TrainOptions) -> tuple[RunResult, str]:
    said = io.StringIO()
    return run(options, console=Console(file=said, width=160)), said.getvalue()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "out"
    _, said = ran(options(model_folder, rows, out, eval_steps=3))
    return out, said


def test_the_folder_explains_itself(finished: tuple[Path, str], model_folder: Path) -> None:
    from transformers import AutoTokenizer

    out, _ = finished
    names = "adapter_config.json adapter_model.safetensors chat_template.jinja tokenizer.json run.json metrics.jsonl"
    assert {f.name for f in out.iterdir()} >= {*names.split(), "loss.png", "samples.jsonl"}
    assert not [f for f in out.iterdir() if f.name.startswith((".", "checkpoint"))]
    config = json.loads((out / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == model_folder
    turn = [{"role": "user", "content": "hi"}]
    ids = [AutoTokenizer.from_pretrained(f).apply_chat_template(turn, tokenize=False) for f in (out, model_folder)]
    assert ids[0] == ids[1]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_run_json(finished: tuple[Path, str], rows: Path) -> None:
    out, _ = finished
    record = json.loads((out / "run.json").read_text())
    assert set(FIELDS.split()) <= record.keys()
    assert record["status"] == "completed" and record["steps"] == 6 and record["examples_seen"] == 48
    assert record["data"]["train"]["kept"] == 32 and record["data"]["val"]["kept"] == 8
    per_epoch, supervised = record["data"]["train"]["tokens"], record["data"]["train"]["supervised_tokens"]
    assert per_epoch < record["tokens_seen"] < 2 * per_epoch
    assert supervised < record["supervised_tokens"] < 2 * supervised
    # the chat template opens every row with the same tokens, which a step computes once
    assert 0.5 * record["tokens_seen"] < record["tokens_computed"] < record["tokens_seen"]
    assert record["tokens_per_second"] == pytest.approx(record["tokens_seen"] / record["train_seconds"], rel=0.01)
    assert record["final_loss"] < record["first_loss"]
    assert record["eval_loss"] < record["eval_loss_before"]
    assert record["trainable_parameters"] == sum(
        t.numel() for t in load_file(out / "adapter_model.safetensors").values()
    )
    assert record["data"]["files"][0]["path"] == str(rows)
    assert record["options"]["learning_rate"] == 1e-2


def test_metrics(finished: tuple[Path, str]) -> None:
    found = lines(finished[0] / "metrics.jsonl")
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(
        line.keys() == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"} for line in steps
    )
    assert [line["step"] for line in found if "eval_loss" in line] == [0, 3, 6]


def test_samples_and_what_is_said(finished: tuple[Path, str]) -> None:
    out, said = finished
    found = lines(out / "samples.jsonl")
    assert len(found) == 3 and all(s["prompt"].startswith("row ") and s["expected"] for s in found)
    assert any(s["before"] != s["after"] for s in found)
    for word in (
        "compute   cpu, float32",
        "loss on   every assistant turn",
        "end with <|im_end|>",
        "trains ",
        "6 steps, 0 of warm-up",
    ):
        assert word in said, said
    assert "step 6/6: loss" in said and "held out" in said


def test_the_same_seed_is_the_same_run(
    model_folder: Path, rows: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    torch.rand(7)
    ran(options(model_folder, rows, tmp_path / "again", eval_steps=3))
    first, second = (load_file(f / "adapter_model.safetensors") for f in (finished[0], tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_resumed(model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.train.callbacks import ProgressBar

    whole = options(model_folder, rows, tmp_path / "whole", save_steps=2, eval_steps=2)
    ran(whole)

    def killed(self: Any, args: Any, state: Any, control: Any, **now: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    part = options(model_folder, rows, tmp_path / "part", save_steps=2, eval_steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProgressBar, "on_step_end", killed)
        ran(part)
    record = json.loads((tmp_path / "part" / "run.json").read_text())
    assert record["status"] == "interrupted" and not (tmp_path / "part" / "adapter_model.safetensors").exists()
    part.resume_from_checkpoint = "last"
    ran(part)
    first, second = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "whole", tmp_path / "part"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "part"))
    assert [(x["step"], x.get("loss"), x.get("eval_loss")) for x in a] == [
        (x["step"], x.get("loss"), x.get("eval_loss")) for x in b
    ]


def test_init_adapter_starts_from_its_weights(
    model_folder: Path, rows: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    before = json.loads((finished[0] / "run.json").read_text())
    _, said = ran(
        options(model_folder, rows, tmp_path / "next", init_adapter=str(finished[0]), max_steps=1, learning_rate=1e-6)
    )
    after = json.loads((tmp_path / "next" / "run.json").read_text())
    assert after["eval_loss_before"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert "from " + str(finished[0]) in said


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"adapter": "ia3"}, "adapter ia3 was asked for, and init_adapter .* holds lora"),
        ({"adapter_options": {"r": 3}}, "was made with other options \\(r: 8 there, 3 asked\\); leave them out"),
    ],
)
def test_another_adapter_than_the_one_to_start_from_is_refused(
    model_folder: Path, rows: Path, finished: tuple[Path, str], tmp_path: Path, over: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ran(options(model_folder, rows, tmp_path / "out", init_adapter=str(finished[0]), **over))


def test_a_wrong_target_is_found_before_weights_are_read(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.train import load

    monkeypatch.setattr(load, "load_model", None)
    wrong = options(model_folder, rows, tmp_path, learning_rate=-1.0, adapter_options={"target_modules": ["q_prj"]})
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*above 0.*Did you mean 'q_proj'\?"):
        run(wrong)


def test_an_adapter_of_another_method_is_told_by_its_name(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    first = options(model_folder, rows, tmp_path / "first", adapter="ia3", max_steps=1, val_size=0)
    _, said = ran(first)
    assert "adapter   ia3, new: trains " in said
    _, said = ran(options(model_folder, rows, tmp_path / "next", init_adapter=first.output_dir, max_steps=1, val_size=0))
    assert f"adapter   ia3, from {first.output_dir}: trains " in said


def test_a_damaged_adapter_is_found_before_any_row_is_read(
    model_folder: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="damaged or cut off") as said:
        run(options(model_folder, tmp_path / "no rows", tmp_path / "out", init_adapter=str(folder)))
    assert "2 problems" in str(said.value)


def test_a_constant_rate_has_no_warm_up(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    over: dict[str, Any] = dict(lr_scheduler_type="constant", warmup_ratio=0.5, max_steps=2, val_size=0)
    _, said = ran(options(model_folder, rows, tmp_path, **over))
    assert "2 steps, 0 of warm-up, constant from 0.01" in said
    assert [line["learning_rate"] for line in lines(tmp_path / "metrics.jsonl")] == [0.01, 0.01]


def test_a_default_rate_is_said_to_be_that_of_lora(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    line = "the learning rate is the default of lora; ia3 may need another: --learning_rate"
    few: dict[str, Any] = {"max_steps": 1, "val_size": 0, "sample_prompts": []}
    assert line in ran(options(model_folder, rows, tmp_path / "a", adapter="ia3", learning_rate=None, **few))[1]
    assert line not in ran(options(model_folder, rows, tmp_path / "b", adapter="ia3", **few))[1]
    assert "may need another" not in ran(options(model_folder, rows, tmp_path / "c", learning_rate=None, **few))[1]


def test_an_earlier_run_is_kept_aside(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    ran(options(model_folder, rows, tmp_path, max_steps=1, val_size=0))
    first = (tmp_path / "adapter_model.safetensors").read_bytes()
    _, said = ran(options(model_folder, rows, tmp_path, max_steps=2, val_size=0))
    assert "held an earlier run: it is kept in earlier-1/" in said
    assert (tmp_path / "earlier-1" / "adapter_model.safetensors").read_bytes() == first
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != first


def test_every_wrong_option_is_said_at_once(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    wrong = options(
        model_folder,
        rows,
        tmp_path / "out",
        learning_rate=-1.0,
        micro_batch_size=3,
        lr_scheduler_type="cosin",
        adapter="lorra",
        val_size=0,
        early_stopping_patience=2,
        warmup_ratio=3.0,
        model=str(model_folder) + "x",
    )
    with pytest.raises(ConfigError) as said:
        run(wrong)
    for part in (
        "7 problems",
        "learning_rate is -1.0; it must be above 0",
        "micro_batch_size 3 does not divide batch_size 8; these do: 1, 2, 4, 8",
        "lr_scheduler_type 'cosin' is not known. Did you mean 'cosine'?",
        "no method is called 'lorra'. Did you mean 'lora'?",
        "early_stopping_patience needs rows that are held out",
        "warmup_ratio is 3.0",
        "Did you mean 'tiny-llama'?",
    ):
        assert part in str(said.value), str(said.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir .* cannot be written: a file is in the way\. Fix: "):
        run(options(model_folder, rows, tmp_path / "file" / "out"))


def test_a_run_that_cannot_start_leaves_nothing(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.train import run as module

    real = module._model

    def frozen(*given: Any) -> Any:
        return real(*given).requires_grad_(False)

    monkeypatch.setattr(module, "_model", frozen)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        run(options(model_folder, rows, tmp_path / "deep" / "out"), console=Console(file=io.StringIO()))
    assert not (tmp_path / "deep").exists()


def test_a_run_that_stops_before_its_first_step_puts_an_earlier_one_back(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.train import run as module

    ran(options(model_folder, rows, tmp_path, max_steps=1, val_size=0))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def stopped(self: Any, when: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Job, "_answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        ran(options(model_folder, rows, tmp_path, max_steps=1, val_size=0))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_run_whose_last_files_cannot_be_written_says_so_in_its_record(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.train.folder import RunFolder

    def full(self: Any, *given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        ran(options(model_folder, rows, tmp_path, max_steps=2, val_size=0))
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("failed", 2) and "No space left" in record["error"]


def test_folders_of_an_earlier_tokenizer_are_written_over(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer of several templates saves them in a folder of their own."""
    from trimtab.train import folder as module

    real = module.check_saved

    def with_a_folder(partial: Path, renderer: Any) -> None:
        real(partial, renderer)
        (partial / "additional_chat_templates").mkdir()
        (partial / "additional_chat_templates" / "tool_use.jinja").write_text(str(len([*tmp_path.glob("earlier-*")])))

    monkeypatch.setattr(module, "check_saved", with_a_folder)
    for _ in range(2):
        ran(options(model_folder, rows, tmp_path, max_steps=1, val_size=0))
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").read_text() == "1"
    assert not (tmp_path / ".result.partial").exists()

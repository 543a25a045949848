"""Each cause that `trimtab doctor` knows, made on purpose in a healthy folder, is the one it names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab import origin
from trimtab.doctor import CHECKS, examine

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path, run: Callable) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "tuned"
    steps = ["--max_steps", "12", "--batch_size", "8", "--r", "2", "--dtype", "float32", "--learning_rate", "1e-2"]
    result = run("train", rows, "--model", model, "--output_dir", folder, *steps)
    assert result.exit_code == 0, result.output + str(result.exception)
    return folder


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "adapter"))


def tensors(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    changed = {k: change(k, v) for k, v in load_file(folder / WEIGHTS).items()}
    save_file({k: v for k, v in changed.items() if v is not None}, folder / WEIGHTS)


def record(folder: Path, *path: str, value: Any) -> None:
    whole = here = json.loads((folder / "run.json").read_text())
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    (folder / "run.json").write_text(json.dumps(whole))


def lost_keys(f: Path) -> None:
    tensors(f, lambda k, v: None if "q_proj" in k else v)


def never_trained(f: Path) -> None:
    tensors(f, lambda k, v: torch.zeros_like(v) if "lora_B" in k else v)


def hardly_trained(f: Path) -> None:
    tensors(f, lambda k, v: v * 1e-6 if "lora_B" in k else v)


def another_template(f: Path) -> None:
    file = f / "chat_template.jinja"
    file.write_text(file.read_text().replace("{{ m.content }}", " {{ m.content | trim }}"))


def no_end(f: Path) -> None:
    record(f, "template", "examples_with_a_learnt_end", value=3)


def cut_ends(f: Path) -> None:
    no_end(f)
    record(f, "options", "overlong", value="truncate_end")


def another_end(f: Path) -> None:
    record(f, "template", "stop_token_ids", value=[7])


def not_finite(f: Path) -> None:
    tensors(f, lambda k, v: v.index_fill(0, torch.tensor([0]), float("nan")) if "lora_A" in k else v)


def base_tuned_further(f: Path) -> None:
    said = json.loads((f / origin.FILE).read_text())
    said["base"]["values"] = said["base"]["values"][:-1] + ("0" if said["base"]["values"][-1] != "0" else "1")
    (f / origin.FILE).write_text(json.dumps(said))


def nothing_supervised(f: Path) -> None:
    record(f, "supervised_tokens", value=0)


def rows_dropped(f: Path) -> None:
    record(f, "data", "train", "kept", value=4)
    record(f, "data", "train", "dropped", value={"longer than max_length": {"rows": 36, "places": []}})


def losses(f: Path, *values: float) -> None:
    (f / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "loss": v}) + "\n" for i, v in enumerate(values)))


def loss_rose(f: Path) -> None:
    losses(f, *(2.0 + 0.1 * i for i in range(12)))


def loss_not_finite(f: Path) -> None:
    losses(f, 2.0, float("nan"), 1.0)


def too_few_steps(f: Path) -> None:
    record(f, "steps", value=2)


def failed(f: Path) -> None:
    record(f, "status", value="failed")
    record(f, "error", value="the disk is full")


def learnt_by_heart(f: Path) -> None:
    record(f, "eval_loss_before", value=2.0)
    record(f, "eval_loss", value=2.5)


def rate_too_low(f: Path) -> None:
    record(f, "options", "learning_rate", value=1e-7)


def rate_too_high(f: Path) -> None:
    record(f, "options", "learning_rate", value=1.0)


CAUSES: list[tuple[Callable[[Path], None], str, str, str]] = [
    (lost_keys, "keys", "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "made for"),
    (never_trained, "change", "changes nothing: on 7 probes the logits are the base's; all zero: lora_B", "more steps"),
    (hardly_trained, "change", "changes next to nothing", "a higher learning rate"),
    (another_template, "template", "as other tokens than the run did", "chat_template.jinja"),
    (no_end, "end", "<|im_end|> ends 3 of 40 examples, so the model never stops", "last turn is the assistant's"),
    (cut_ends, "end", "truncate_end cuts it off", "--overlong drop"),
    (another_end, "end", "generation stops at <|im_end|>", "stop tokens"),
    (not_finite, "dtype", "is not finite", "an earlier checkpoint"),
    (base_tuned_further, "base", "of one architecture, and with other values", "--model FOLDER"),
    (nothing_supervised, "labels", "none carried loss", "trimtab data check"),
    (rows_dropped, "labels", "of 40 rows 4 were trained on (36 longer than max_length)", "--max_length"),
    (loss_rose, "loss", "nothing was learnt: the loss went from 2 to 3.1", "another learning rate"),
    (loss_not_finite, "loss", "not finite at line 2", "a lower learning rate"),
    (too_few_steps, "loss", "the run took 2 steps", "more epochs"),
    (failed, "loss", "failed after 12 steps: the disk is full", "run again"),
    (learnt_by_heart, "loss", "held-out rows became less likely (2 before, 2.5 after)", "fewer epochs"),
    (rate_too_low, "rate", "1e-07 is very low: 0.002 is usual", "--learning_rate 0.002"),
    (rate_too_high, "rate", "1 is very high: 0.002 is usual", "--learning_rate 0.002"),
]


def test_every_check_has_a_cause() -> None:
    assert {check for _, check, _, _ in CAUSES} == set(CHECKS)


@pytest.mark.parametrize(("harm", "check", "seen", "fix"), CAUSES, ids=[harm.__name__ for harm, *_ in CAUSES])
def test_the_cause_is_named_first(harm: Callable[[Path], None], check: str, seen: str, fix: str, folder: Path) -> None:
    harm(folder)
    cause = examine(folder).cause
    assert cause is not None and cause.check == check, cause
    assert seen in cause.seen and fix in cause.fix, cause


def test_a_healthy_adapter(healthy: Path, run: Callable) -> None:
    result = run("doctor", healthy)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()[3:12]] == ["well"] * 9, result.output
    assert "healthy" in result.output


def test_a_prompt_method_s_adapter(tmp_path: Path, model: Path, rows: Path, run: Callable) -> None:
    """Its virtual tokens have logits of their own; and no plain model can be made of it, which is said beforehand."""
    out = tmp_path / "a b"
    steps = ["--max_steps", "1", "--dtype", "float32", "--adapter", "prompt_tuning", "--num_virtual_tokens", "3"]
    said = run("train", rows, "--model", model, "--output_dir", out, *steps)
    assert said.exit_code == 0, said.output + str(said.exception)
    assert "it is used beside the model, and cannot be merged" in said.output and "trimtab merge" not in said.output
    assert f"trimtab chat '{out}'" in said.output
    assert next(f for f in examine(out).findings if f.check == "change").state == "well"


def test_the_command_names_cause_and_fix_and_exits_1(folder: Path, run: Callable) -> None:
    never_trained(folder)
    result = run("doctor", folder)
    assert (result.exit_code == 1 and result.exception is None) or isinstance(result.exception, SystemExit), result.output
    last = [line for line in result.output.splitlines() if line.strip()][-2:]
    assert last[0].startswith("cause     change: the adapter changes nothing") and last[1].startswith("fix       a higher")


def test_a_published_folder_has_no_record(folder: Path) -> None:
    for name in ("run.json", "metrics.jsonl", origin.FILE):
        (folder / name).unlink()
    report = examine(folder)
    assert report.cause is None
    assert [f.check for f in report.findings if f.state == "unknown"] == ["template", "end", "base", "labels", "loss", "rate"]


@pytest.mark.parametrize("what", ["nothing", "damaged", "pickle", "model"])
def test_where_it_cannot_look_it_exits_2(what: str, folder: Path, run: Callable) -> None:
    more: list[str] = []
    if what == "nothing":
        shutil.rmtree(folder)
    elif what == "damaged":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    elif what == "pickle":
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
    else:
        more = ["--model", str(folder / "nowhere")]
    result = run("doctor", folder, *more)
    assert result.exit_code == 2 and "error: " in result.stderr and "Traceback" not in result.output
    if what == "pickle":
        assert "--allow_pickle" in result.stderr
        assert run("doctor", folder, "--allow_pickle").exit_code == 0

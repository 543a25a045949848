"""`--verify_resume`: shows, on the user's own model, rows and options, that a run which is resumed has the same bytes.

Two processes do the first steps of the run. One does them all, and saves a checkpoint half-way and at the end; the other
begins at the first of these checkpoints. What they end with must be the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from trimtab.errors import TrainingError, TrimtabError
from trimtab.train import checkpoint
from trimtab.train.callbacks import read_metrics
from trimtab.train.folder import METRICS
from trimtab.train.options import TrainOptions
from trimtab.train.saving import OPTIMIZER, RANK

STEPS = 3  # before the checkpoint, and as many after it
SCRATCH = ".verify_resume"


def verify(options: TrainOptions, say: Callable[[str, str], None]) -> None:
    """Raise `TrainingError` where the two ends differ, naming what; on a device other than a CPU, say it."""
    out = Path(options.output_dir).expanduser()
    made = [f for f in (out, *out.parents) if not f.exists()]
    scratch = out / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        first = _process(options, scratch / "whole", None)
        half, end = (scratch / "whole" / f"{checkpoint.NAME}{n}" for n in (first["half"], first["end"]))
        second = _process(options, scratch / "resumed", half)
        wrong = _differences(end, scratch / "resumed" / end.name, first, second)
        tensors = len(checkpoint.read_tensors(end / checkpoint.TENSORS))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
    done = f"{first['end']} steps, and again from the checkpoint of step {first['half']} in a new process"
    if not wrong:
        return say("resume", f"{done}: {tensors} tensors, optimizer, random numbers and losses are the same, byte for byte")
    text = f"{done}, do not end the same: {'; '.join(wrong)}"
    if first["device"] == "cpu":
        raise TrainingError(f"verify_resume: {text}")
    say("resume", f"{text}. On {first['device']} sums may come in another order each time")


def _differences(whole: Path, resumed: Path, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    found = []
    for file in (checkpoint.TENSORS, OPTIMIZER):
        a, b = (checkpoint.read_tensors(folder / file) for folder in (whole, resumed))
        if other := [name for name in a if name not in b or not checkpoint.same(a[name], b[name])]:
            far = max(float((a[n].double() - b[n].double()).abs().max()) for n in other if n in b and a[n].numel())
            found.append(f"{len(other)} of {len(a)} tensors in {file}, first {other[0]}, by {far:.2g} at most")
    a, b = (json.loads((folder / RANK.format(0)).read_text(encoding="utf-8")) for folder in (whole, resumed))
    if a["random"] != b["random"]:
        found.append("the random numbers that follow")
    mine = [loss for loss in first["losses"] if loss[0] > first["half"]]
    if mine != second["losses"]:
        found.append(f"losses, {mine} and {second['losses']}")
    return found


def _process(options: TrainOptions, folder: Path, resume: Path | None) -> dict[str, Any]:
    """The first steps of the run, in a process of their own; what it tells."""
    given = replace(
        options, output_dir=str(folder), resume_from_checkpoint=resume and str(resume), verify_resume=False, report_to=[],
        logging_steps=1, early_stopping_patience=None, load_best_model_at_end=False,
    )  # fmt: skip
    command = [sys.executable, "-m", "trimtab.train.verify"]
    done = subprocess.run(command, input=json.dumps(asdict(given)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"verify_resume: the first steps failed.\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def rehearse(options: TrainOptions) -> dict[str, Any]:
    """The first steps of a run, with nothing around them: no answers, no evaluations, no results."""
    from rich.console import Console

    from trimtab.train.run import job

    made = job(options, Console(quiet=True))
    if made.steps() < 2:
        raise TrainingError("a run of one step cannot be resumed half-way: leave verify_resume out")
    half = min(STEPS, made.steps() // 2)
    args, resume = made.trainer.args, options.resume_from_checkpoint
    args.save_strategy, args.save_steps, args.save_total_limit = SaveStrategy.STEPS, half, None
    args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    made.trainer.add_callback(_Stop(2 * half))
    made.path.mkdir(parents=True, exist_ok=True)
    made.trainer.train(resume_from_checkpoint=resume)
    losses = [[line["step"], line["loss"]] for line in read_metrics(made.path / METRICS) if "loss" in line]
    return {"half": half, "end": 2 * half, "device": args.device.type, "losses": losses}


def main() -> int:
    try:
        found = rehearse(TrainOptions(**json.load(sys.stdin)))
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n" + json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

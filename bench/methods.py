"""Every method of the registry on the same rows: what it learns, how large it is, how fast it trains.

    python bench/methods.py                                all methods: hours on two cores
    python bench/methods.py --only lora,dora,oft           these alone
    python bench/methods.py --report                       table and picture again, from what is there

Each method trains on the same rows of banking77 at three learning rates for a part of the budget; the one with the lowest loss
on the validation rows trains for the whole budget, and answers the test rows. A run is a process of its own and one line of
results.jsonl when it is done, so an interrupted bench goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
from learning import choose, picture, table
from results import read_lines
from trimtab.core.config import load, methods
from trimtab.demo.model import bundled_model
from works import BANKING, read, write

BENCH = Path(__file__).resolve().parent
RATES = (5e-4, 3e-3, 2e-2)
# where these are known to be far off: what is trained is a table of tokens, or acts on the weights through a small factor,
# or through a large one
OTHER_RATES = {
    "prompt_tuning": (2e-2, 1e-1, 4e-1),
    "fourierft": (2e-2, 1e-1, 4e-1),
    "waveft": (2e-2, 1e-1, 4e-1),
    "delora": (2e-5, 1e-4, 5e-4),
}
# fields that a method cannot do without, or whose defaults are made for another length of run
OPTIONS: dict[str, Any] = {
    "c3a": lambda steps: {"block_size": 64},  # which must divide all widths
    "adalora": lambda steps: {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 3, "deltaT": 5, "lora_alpha": 16},
}
OWN_TARGETS = {"ln_tuning", "trainable_tokens"}  # on linear layers these would train whole weights
BASE = "base"  # the model without an adapter
TIMEOUT = 4 * 3600  # seconds


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="a model folder (default: the bundled SmolLM2-135M-Instruct)")
    p.add_argument("--data", type=Path, default=BENCH.parents[1] / "shared" / "data" / BANKING, help="(%(default)s)")
    p.add_argument("--only", help="these methods, by name, with commas (default: all)")
    p.add_argument("--rows", type=int, default=1000, help="to train on (%(default)s)")
    p.add_argument("--val", type=int, default=100, help="rows that choose the learning rate (%(default)s)")
    p.add_argument("--test", type=int, default=200, help="rows that are answered in the end (%(default)s)")
    p.add_argument("--epochs", type=float, default=4, help="the whole budget (%(default)s)")
    p.add_argument("--search_epochs", type=float, default=1, help="for each learning rate (%(default)s)")
    p.add_argument("--rates", help="three learning rates, with commas, for all methods (default: see RATES)")
    p.add_argument("--batch_size", type=int, default=16, help="(%(default)s)")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(%(default)s)")
    p.add_argument("--output_dir", type=Path, default=BENCH / "out" / "methods", help="results, logs, adapters (%(default)s)")
    p.add_argument("--out", type=Path, default=BENCH / "METHODS.md", help="the table (%(default)s)")
    p.add_argument("--report", action="store_true", help="write table and picture from earlier results; run nothing")
    p.add_argument("--one", help=argparse.SUPPRESS)  # a run, as JSON: what the processes of this script are called with
    return p.parse_args()


def split(rows: list[Any], *sizes: int) -> list[list[Any]]:
    """Parts of these sizes, drawn once: the same for every method and every call, and none has a row of another."""
    if sum(sizes) > len(rows):
        raise SystemExit(f"error: {sum(sizes)} rows are needed, and the file has {len(rows)}")
    drawn = random.Random(0).sample(rows, sum(sizes))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [drawn[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def rates(method: str, asked: str | None) -> list[float]:
    return [float(r) for r in asked.split(",")] if asked else list(OTHER_RATES.get(method, RATES))


def names(only: str | None) -> list[str]:
    known = methods()
    chosen = only.split(",") if only else [BASE, *known]
    if strange := [n for n in chosen if n not in (BASE, *known)]:
        raise SystemExit(f"error: --only {', '.join(strange)}: not one of {', '.join(known)}")
    return chosen


# ---- the runs


class Bench:
    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.folder = a, a.output_dir.resolve()
        self.model = (a.model or bundled_model()).expanduser().resolve()
        self.file = self.folder / "results.jsonl"
        self.lines = [line for line in read_lines(self.file) if "failed" not in line]  # what failed is tried again
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = split(read(a.data), a.rows, a.val, a.test)
        named = zip(("train", "val", "test"), parts, strict=True)
        self.rows = {name: write(part, self.folder / f"{name}.jsonl") for name, part in named}

    def run(self, method: str) -> None:
        if method == BASE:
            self.one(method, "final", 0.0, 0.0)
            return
        found = [self.one(method, "search", rate, self.a.search_epochs) for rate in rates(method, self.a.rates)]
        if (chosen := choose(found)) is not None:
            self.one(method, "final", chosen, self.a.epochs)

    def one(self, method: str, stage: str, rate: float, epochs: float) -> dict[str, Any]:
        """The line of a run: an earlier one, or that of a process which is started now."""
        a = self.a
        key = {"method": method, "stage": stage, "rate": rate, "epochs": epochs, "rows": a.rows, "val": a.val}
        key |= {"test": a.test, "batch_size": a.batch_size, "model": self.model.name}
        earlier = [line for line in self.lines if all(line.get(k) == v for k, v in key.items())]
        if earlier:
            return earlier[-1]
        print(f"{method}, {stage}, learning rate {rate:g}, {epochs:g} epochs ... ", end="", flush=True)
        with machine.Others() as others:
            line = key | self._process(key)
        line |= {"others_cores": others.cores, "code": machine.code()}
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        said = f"failed: {line['failed']}" if "failed" in line else f"loss {line['val_loss']:.4f}"
        print(said + (f", {100 * line['exact_match']:.1f} % right" if "exact_match" in line else ""))
        return line

    def _process(self, key: dict[str, Any]) -> dict[str, Any]:
        name = f"{key['method']}-{key['stage']}-{key['rate']:g}"
        place, log = self.folder / "runs" / name, self.folder / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        given = key | {"place": str(place), "path": str(self.model), "files": {k: str(v) for k, v in self.rows.items()}}
        count = str(self.a.threads)
        environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(given), "--output_dir", str(self.folder)]
        with log.open("w") as file:
            try:
                done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                return {"failed": f"not done after {TIMEOUT / 3600:g} hours"}
        if not result.exists():
            said = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
            return {"failed": (said or [f"exit code {done.returncode}"])[-1].strip()[:400]}
        return json.loads(result.read_text())


def one(given: dict[str, Any], result: Path) -> None:
    """A run, in this process."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found: dict[str, Any] = {}
    if given["method"] == BASE:
        model, renderer = base(given)
        found = {"val_loss": loss_on(given["files"]["val"], model, renderer), "trainable_parameters": 0}
    else:
        model, renderer, found = trained(given)
    if given["stage"] == "final":
        found |= answers(given, model, renderer)
    result.write_text(json.dumps(found))


def trained(given: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trimtab.train import samples
    from trimtab.train.folder import RUN
    from trimtab.train.options import TrainOptions
    from trimtab.train.run import run

    samples.choose = lambda *_: []  # what is answered here are the test rows, in the end
    options = TrainOptions(
        dataset=[given["files"]["train"]],
        val_dataset=[given["files"]["val"]],
        model=given["path"],
        output_dir=given["place"],
        adapter=given["method"],
        adapter_options=adapter_options(given),
        batch_size=given["batch_size"],
        num_train_epochs=given["epochs"],
        learning_rate=given["rate"],
        compile="off",  # it takes a minute for each method, and more than that for some
    )
    done = run(options)
    record, place = done.record, Path(given["place"])
    kept = "trainable_parameters tokens_per_second peak_memory_bytes train_seconds steps first_loss final_loss".split()
    found = {name: getattr(record, name) for name in kept}
    if record.eval_loss is None or not math.isfinite(record.eval_loss):
        raise SystemExit(f"the validation loss is {record.eval_loss}")
    (place / RUN).rename(place / f"{given['stage']}.{RUN}")
    return done.model, done.renderer, found | {
        "val_loss": record.eval_loss,
        "adapter_bytes": (place / "adapter_model.safetensors").stat().st_size,
    }


def adapter_options(given: dict[str, Any]) -> dict[str, Any]:
    """All linear layers where the method takes them, else what it takes by itself; and what it cannot do without."""
    from trimtab.core.config import config_for
    from trimtab.errors import TrimtabError
    from trimtab.model import get_peft_model
    from trimtab.train.load import skeleton

    method = given["method"]
    steps = int(math.ceil(given["rows"] / given["batch_size"]) * given["epochs"])
    own: dict[str, Any] = OPTIONS[method](steps) if method in OPTIONS else {}
    if method in OWN_TARGETS or "target_modules" not in load(method).config.__dataclass_fields__:
        return own
    wide = own | {"target_modules": "all-linear"}
    try:
        get_peft_model(skeleton(given["path"]), config_for(method, task_type="CAUSAL_LM", **wide))
    except NotImplementedError:  # it looks at the values of weights, which a skeleton has not
        return wide
    except TrimtabError:
        return own
    return wide


def base(given: dict[str, Any]) -> tuple[Any, Any]:
    from trimtab.data import Renderer
    from trimtab.train import load as loading
    from trimtab.train.device import pick

    hardware, folder = pick("auto"), Path(given["path"])
    model = loading.load_model(folder, dtype=hardware.dtype, device=hardware.device, held=True)
    return model, Renderer(loading.load_tokenizer(folder))


def loss_on(file: str, model: Any, renderer: Any) -> float:
    from trimtab.data import prepare
    from trimtab.evaluate import loss

    return loss(model, prepare([file], renderer).train, pad_token_id=renderer.tokenizer.pad_token_id)


def answers(given: dict[str, Any], model: Any, renderer: Any) -> dict[str, Any]:
    """What the test rows show: the share that is answered exactly, and the loss."""
    from trimtab.data import prepare
    from trimtab.evaluate import exact_match, generate_answers

    rows = prepare([given["files"]["test"]], renderer).conversations
    said = generate_answers(model, renderer, [row.prompt for row in rows], 32)
    expected = [row.answer or "" for row in rows]
    return {"exact_match": exact_match(said, expected), "loss": loss_on(given["files"]["test"], model, renderer)}


def report(a: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    header = {"machine": machine.machine(), "versions": machine.versions()}
    a.out.write_text(table(lines, header), encoding="utf-8")
    picture(lines, a.out.with_name("methods.png"))


def main() -> int:
    a = arguments()
    if a.one:
        one(json.loads(a.one), a.output_dir / "result.json")
        return 0
    if a.report:
        report(a, read_lines(a.output_dir.resolve() / "results.jsonl"))
        return 0
    bench = Bench(a)
    for method in names(a.only):
        bench.run(method)
        report(a, bench.lines)
    print(f"written: {a.out} and methods.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

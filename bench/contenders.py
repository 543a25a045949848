"""Who trains: trimtab through its command line, the peers through their scripts. Each run is a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from works import Work

BENCH = Path(__file__).resolve().parent
PEERS = ("peft_trainer", "tutorial", "trl_sft", "trl_packing")
OURS = (sys.executable, "-c", "from trimtab.cli import main; main()", "train")
WARM = 10  # the first steps, in which a compiler may run, do not count as steady
TIMEOUT = 3600  # seconds
RUN, METRICS = "run.json", "metrics.jsonl"  # what our runs write
ADAPTER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Contender:
    """`kind` is trimtab or a peer; `flags` make the variants of one kind; `name` is what the table calls it."""

    name: str
    kind: str
    rows: int
    flags: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.kind == "trimtab"


@dataclass(frozen=True)
class Job:
    """What is the same for all contenders of a work."""

    model: Path
    file: Path
    batch_size: int
    learning_rate: float
    max_length: int
    four_bit: bool
    threads: int
    dtype: str = "bfloat16"
    init_adapter: Path | None = None
    peers: Path | None = None


class RunFailed(Exception):
    """The process of a contender ended without a result; the text says how."""


def lineup(
    work: Work, peers: list[str], compile_modes: list[str | None], batch_size: int = 16, rows: int | None = None,
    sizes: tuple[int, ...] = (),
) -> list[Contender]:  # fmt: skip
    """Everyone who takes part in a work. `rows` replaces our number and caps the peers'; `sizes` are peft_trainer's
    micro-batches, if not all that the work names."""
    ours = rows or work.rows["trimtab"]
    found = [
        Contender("trimtab", "trimtab", ours)
        if mode is None
        else Contender(f"trimtab --compile {mode}", "trimtab", ours, ("--compile", mode))
        for mode in compile_modes
    ]
    for kind in peers:
        if kind in work.rows:
            n = min(rows or work.rows[kind], work.rows[kind])
            found += [Contender(name, kind, n, flags) for name, flags in variants(work, kind, batch_size, sizes)]
    return found


def variants(work: Work, kind: str, batch_size: int, sizes: tuple[int, ...] = ()) -> list[tuple[str, tuple[str, ...]]]:
    """(name, flags) of each way a peer runs."""
    if kind == "peft_trainer":
        each = sorted({min(size, batch_size) for size in sizes or work.micro_batches})
        return [(f"peft_trainer, micro-batch {size}", ("--micro_batch_size", str(size))) for size in each]
    if kind == "trl_sft":
        size = min(work.trl_batch, batch_size)
        return [(f"trl_sft, batch {size}", ("--batch_size", str(size)))]
    return [("trl_sft --packing", ("--packing",)) if kind == "trl_packing" else (kind, ())]


# ---- command lines


def our_command(job: Job, rows: int, flags: tuple[str, ...], output: Path) -> list[str]:
    """The same step as the peers': file order, constant rate, no warm-up, loss on the last answer, the end cut off."""
    given = {
        "model": job.model,
        "output_dir": output,
        "max_train_samples": rows,
        "batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
        "max_length": job.max_length,
        "dtype": job.dtype,
        "shuffle": "false",
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "train_on": "last",
        "overlong": "truncate_end",
        "allow_unended": "true",
        "sample_prompts": "Hello",  # one short answer before and after, outside the clock
    }
    if job.four_bit:
        given["load_in_4bit"] = "true"
    if job.init_adapter is not None:
        given["init_adapter"] = job.init_adapter
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [*OURS, str(job.file), *options, *flags]


def peer_command(job: Job, kind: str, rows: int, flags: tuple[str, ...], adapter_out: Path | None = None) -> list[str]:
    assert job.peers is not None
    script = job.peers / f"{'trl_sft' if kind == 'trl_packing' else kind}.py"
    given = {
        "model": job.model,
        "data": job.file,
        "rows": rows,
        "batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
        "max_length": job.max_length,
        "dtype": job.dtype,
        "threads": job.threads,
        "target_modules": ",".join(ADAPTER),
    }
    if job.init_adapter is not None and not script.name.startswith("trl"):  # which always begins with its own
        given["init_adapter"] = job.init_adapter
    if adapter_out is not None:
        given["adapter_out"] = adapter_out
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    four_bit = ["--load_in_4bit"] if job.four_bit else []
    return [sys.executable, str(BENCH / "peer.py"), str(script), *options, *four_bit, *flags]


# ---- runs


def run(command: list[str], folder: Path, threads: int, timeout: float = TIMEOUT) -> str:
    """What the command printed. It works in `folder`, which is emptied first, and keeps both its streams."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    count = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # nothing is compiled beforehand
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=timeout,
                preexec_fn=_first_to_go if Path("/proc/self/oom_score_adj").exists() else None,
            )
        except subprocess.TimeoutExpired:
            raise RunFailed(f"stopped after {timeout:.0f} s") from None
    if done.returncode:
        raise RunFailed(reason(done.returncode, err.read_text() + "\n" + out.read_text()))
    return out.read_text()


def _first_to_go() -> None:
    """Where memory runs out, the kernel is to end this run and nobody else's."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def reason(code: int, text: str) -> str:
    """How a process failed, in a few words."""
    if code == -9 or "DefaultCPUAllocator" in text or "OutOfMemoryError" in text:
        return "out of memory"
    lines = [line.strip() for line in text.split("\n") if "rror" in line]
    return f"exit code {code}: {(lines or ['no message'])[-1][:200]}"


def measure(contender: Contender, job: Job, folder: Path) -> dict[str, Any]:
    """Run one contender once. The figures of its own report, under the same names for all."""
    if contender.ours:
        output = folder / "adapter"
        run(our_command(job, contender.rows, contender.flags, output), folder, job.threads)
        for name in (RUN, METRICS):
            (output / name).replace(folder / name)
        for large in (output, folder / "compiled"):  # for each cell they would add up
            shutil.rmtree(large, ignore_errors=True)
        return our_figures(folder)
    return peer_figures(run(peer_command(job, contender.kind, contender.rows, contender.flags), folder, job.threads))


def our_figures(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    lines = (folder / METRICS).read_text(encoding="utf-8").split("\n")
    metrics = [line for line in map(json.loads, filter(None, lines)) if "loss" in line]
    names = ("steps", "tokens_computed", "supervised_tokens", "train_seconds", "tokens_per_second", "peak_memory_bytes")
    return {name: record[name] for name in names} | {
        "examples": record["examples_seen"],
        "tokens": record["tokens_seen"],
        "steady_tokens_per_second": steady([line["tokens_per_second"] for line in metrics]),
        "losses": [line["loss"] for line in metrics],
    }


def steady(speeds: list[float], warm: int = WARM) -> float | None:
    """Tokens/s once the first steps are over: n / sum(1 / speed), which is tokens over seconds for steps of like size.
    None where fewer steps follow than were left out."""
    later = speeds[warm:]
    return round(len(later) / sum(1 / speed for speed in later), 1) if len(later) >= warm else None


def peer_figures(printed: str) -> dict[str, Any]:
    """The result line of a peer's script; on a graphics card, the memory of the card."""
    found: dict[str, Any] = {}
    for line in printed.split("\n"):
        if line.startswith(('{"peer"', '{"cuda_peak_memory_bytes"')):
            found |= json.loads(line)
    if "peer" not in found:
        raise RunFailed("it printed no result")
    peak = found.pop("cuda_peak_memory_bytes", None)
    return found if peak is None else found | {"peak_memory_bytes": peak}


def make_adapter(job: Job, folder: Path) -> Path:
    """A fresh adapter that every contender starts from, written once by the peers' own script."""
    adapter = folder / "init_adapter"
    if not (adapter / "adapter_config.json").exists():
        run(peer_command(job, "peft_trainer", 0, (), adapter), folder / "logs" / "init_adapter", job.threads)
    return adapter


def matmul_peak(model: Path, threads: int, dtype: str, folder: Path) -> dict[str, Any]:
    """`peak.py` in a process of its own: the machine's matmul rate now, and the name of the graphics card."""
    printed = run([sys.executable, str(BENCH / "peak.py"), str(model), str(threads), dtype], folder, threads)
    return json.loads(printed)

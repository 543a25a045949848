"""Whether the fast step is the same step: our losses against `peft_trainer`'s, same adapter, order and batches.

    python bench/losses.py                       float32, the first 10 steps of each work: no pair may differ by 1e-4
    python bench/losses.py --steps 300           the means of the last 20 steps may differ by 1 %; in bfloat16, where the chip
                                                 has it, rounding drives two runs apart: --dtype float32

Exit code 1 where they differ.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import contenders
import machine
from contenders import Contender, RunFailed
from run import LOSSES, Bench, options
from trimtab.errors import ConfigError
from works import Work

EXACT, CLOSE, LAST = 1e-4, 0.01, 20


def compare(ours: list[float], theirs: list[float], *, each: bool) -> tuple[bool, str]:
    """Whether two runs agree, and the words for it: in each pair, or in the mean of the last steps."""
    if len(ours) != len(theirs):
        return False, f"{len(ours)} steps against {len(theirs)}"
    if each:
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return largest < EXACT, f"largest difference {largest:.1e} (must be below {EXACT:g})"
    mine, other = statistics.mean(ours[-LAST:]), statistics.mean(theirs[-LAST:])
    apart = abs(mine - other) / other
    said = f"last {min(LAST, len(ours))} steps: {mine:.4f} and {other:.4f}, {apart:.2%} apart (must be below {CLOSE:.0%})"
    return apart < CLOSE, said


def both(bench: Bench, work: Work, adapter: Path | None, steps: int, dtype: str, *, each: bool) -> dict[str, Any]:
    """Run ours and the peer; the line for losses.jsonl."""
    batch = bench.a.batch_size or (work.check_batch if dtype == "float32" else 16)
    micro = math.gcd(batch, work.micro_batches[0])
    mode = bench.a.compile[0] if bench.a.compile else None
    job = bench.job(work, adapter, batch_size=batch, dtype=dtype)
    runs = (
        Contender("trimtab", "trimtab", steps * batch, ("--compile", mode) if mode else ()),
        Contender("peft_trainer", "peft_trainer", steps * batch, ("--micro_batch_size", str(micro))),
    )
    logs = bench.output / "logs"
    ours, theirs = (contenders.measure(c, job, logs / f"losses-{work.name}-{dtype}-{c.name}") for c in runs)
    agree, said = compare(ours["losses"], theirs["losses"], each=each)
    for name in ("tokens", "supervised_tokens"):
        if ours[name] != theirs[name]:
            agree, said = False, f"{said}; {ours[name]} {name} against {theirs[name]}"
    about = {"work": work.name, "dtype": dtype, "steps": len(ours["losses"]), "batch_size": batch, "each": each}
    return (
        about
        | {"code": machine.code()}
        | {"ours": ours["losses"], "theirs": theirs["losses"], "agree": agree, "said": said}
    )


def show(line: dict[str, Any]) -> None:
    pairs = list(zip(line["ours"], line["theirs"], strict=False))
    first = 0 if line["each"] else max(len(pairs) - LAST, 0)
    for step, (mine, other) in enumerate(pairs[first:], first + 1):
        print(f"  step {step:3}  {mine:.6f}  {other:.6f}  {mine - other:+.1e}")
    print(f"  {'agree' if line['agree'] else 'DIFFER'}: {line['said']}")


def main() -> int:
    p = options(__doc__ or "")
    p.add_argument("--first", type=int, default=10, help="steps, each compared (%(default)s)")
    p.add_argument("--steps", type=int, help="instead: compare the last of so many (works have rows for 60 to 600)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, with --steps what trimtab takes here")
    a = p.parse_args()
    steps = a.steps or a.first
    dtype = a.dtype = a.dtype or (machine.dtype() if a.steps else "float32")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        try:
            bench = Bench(a, Path(temporary))
        except ConfigError as error:
            print(f"error: {error}")
            return 1
        if bench.peers is None:
            print("so there is nothing to compare with (--peers FOLDER)")
            return 1
        adapter = bench.adapter()
        for work in bench.works:
            print(f"{work.name}, {steps} steps in {dtype}: trimtab, peft_trainer, difference", flush=True)
            try:
                line = both(bench, work, adapter, steps, dtype, each=not a.steps)
            except RunFailed as error:
                print(f"  failed: {error}; the logs are in {bench.output / 'logs'}")
                good = False
                continue
            show(line)
            good = good and line["agree"]
            bench.output.mkdir(parents=True, exist_ok=True)
            with (bench.output / LOSSES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: trimtab and its peers in turn on the same rows, into one table and one picture.

    python bench/run.py                                    all works, three rounds: hours on two cores
    python bench/run.py --works short --repeats 1          the first figures in some minutes
    python bench/run.py --report                           the table again, from what is there

An interrupted bench goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import contenders
import machine
import report
from contenders import PEERS, Contender, Job, RunFailed
from flops import sizes
from results import Cell, Results, read_lines
from trimtab.demo.model import bundled_model
from trimtab.errors import ConfigError
from works import DEFAULT, WORKS, Rows, Work

BENCH = Path(__file__).resolve().parent
BESIDE = BENCH.parents[1] / "shared"
LOSSES = "losses.jsonl"
FOLDERS = {"--model", "--data", "--peers", "--output_dir", "--out"}


def options(about: str) -> argparse.ArgumentParser:
    """What run.py and losses.py both take."""
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="a model folder (default: the bundled SmolLM2-135M-Instruct)")
    p.add_argument("--data", type=Path, default=BESIDE / "data", help="folder of the row files (%(default)s)")
    p.add_argument("--peers", type=Path, default=BESIDE / "peers", help="folder of the peers' scripts (%(default)s)")
    p.add_argument("--works", type=_names(WORKS), help=f"of {','.join(WORKS)} (default: those whose files are there)")
    p.add_argument("--compile", type=_names(("auto", "on", "off")), help="passed to trimtab; auto,off: each in turn")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(%(default)s)")
    p.add_argument("--batch_size", type=int, help="examples an optimizer step (16)")
    p.add_argument("--learning_rate", type=float, default=1e-3, help="constant (%(default)s)")
    p.add_argument("--output_dir", type=Path, default=BENCH / "out", help="results so far, logs (%(default)s)")
    p.add_argument("--out", type=Path, default=BENCH / "RESULTS.md", help="the table (%(default)s)")
    return p


def _names(known: Any) -> Any:
    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if strange := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(strange)}: not one of {', '.join(known)}")
        return found

    return names


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def arguments() -> argparse.Namespace:
    p = options(__doc__ or "")
    p.add_argument("--peer_list", type=_names(PEERS), default=list(PEERS), help=f"of {','.join(PEERS)}")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default=machine.dtype(), help="of all (here: %(default)s)")
    p.add_argument("--micro_batches", type=_sizes, default=(), help="of peft_trainer, as 4,8 (default: see works.py)")
    p.add_argument("--repeats", type=int, default=3, help="rounds (%(default)s)")
    p.add_argument("--rows", type=int, help="our rows in each work, and the most a peer gets (default: see works.py)")
    p.add_argument("--fresh", action="store_true", help="do not go on with earlier results")
    p.add_argument("--report", action="store_true", help="write table and picture from earlier results; run nothing")
    return p.parse_args()


class Bench:
    """One set-up of model, rows and folders, shared by run.py and losses.py."""

    def __init__(self, a: argparse.Namespace, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.a, self.folder = a, folder
        self.model = (a.model or bundled_model()).expanduser().resolve()
        if not (self.model / "tokenizer.json").is_file() or not [*self.model.glob("*.safetensors")]:
            raise ConfigError(f"--model {a.model}: not a folder with a tokenizer.json and *.safetensors")
        self.output = a.output_dir.resolve()
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        self.rows = Rows(a.data.resolve(), folder, lambda text: len(tokenizer.encode(text).ids))
        self.peers = a.peers.resolve() if (a.peers / "peft_trainer.py").is_file() else None
        if self.peers is None:
            print(f"no peers: {a.peers} has no peft_trainer.py; trimtab runs alone")
        self.works = self._works()

    def _works(self) -> list[Work]:
        """The works whose files are there; the demo's own rows where none are."""
        asked = [WORKS[name] for name in self.a.works or DEFAULT]
        for work in asked:
            if missing := self.rows.missing(work):
                print(f"{work.name} is left out: {self.a.data} has no {' and no '.join(missing)} (--data FOLDER)")
        found = [work for work in asked if not self.rows.missing(work)]
        return found or ([] if self.a.works else [WORKS["demo"]])

    def job(self, work: Work, adapter: Path | None, **over: Any) -> Job:
        given: dict[str, Any] = dict(
            model=self.model,
            file=self.rows.file(work),
            batch_size=self.a.batch_size or 16,
            learning_rate=self.a.learning_rate,
            dtype=self.a.dtype,
            max_length=work.max_length,
            four_bit=work.four_bit,
            threads=self.a.threads,
            init_adapter=adapter,
            peers=self.peers,
        )
        return Job(**given | over)

    def adapter(self) -> Path | None:
        if self.peers is None or not self.works:
            return None
        return contenders.make_adapter(self.job(self.works[0], None, four_bit=False), self.folder)

    def header(self, card: str | None) -> Cell:
        settings = {
            "model": self.model.name,
            "sizes": sizes(self.model),
            "batch_size": self.a.batch_size or 16,
            "learning_rate": self.a.learning_rate,
            "threads": self.a.threads,
            "dtype": self.a.dtype,
        }
        found = {"settings": settings, "machine": machine.machine(), "versions": machine.versions()}
        return found | {"code": machine.code(), "card": card}


def command_line(words: list[str]) -> str:
    """As it was typed, without the folders of whoever typed it."""
    shown, i = ["python bench/run.py"], 0
    while i < len(words):
        name, is_, _ = words[i].partition("=")
        if name in FOLDERS:
            i += 1 if is_ else 2
        else:
            shown.append(words[i])
            i += 1
    return " ".join(shown)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run which is under way is ended too
    a = arguments()
    results = Results(a.output_dir.resolve() / "results.jsonl")
    if a.report:
        if not results.cells:
            print(f"no results in {results.path}: run the bench first")
            return 1
        write(a, results, draw=True)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        try:
            bench = Bench(a, Path(temporary))
        except ConfigError as error:
            print(f"error: {error}")
            return 1
        peak = contenders.matmul_peak(bench.model, a.threads, a.dtype, bench.folder / "peak")
        if said := results.open(bench.header(peak["card"]), command_line(sys.argv[1:]), fresh=a.fresh):
            print(said)
        adapter = bench.adapter()
        for work in bench.works:
            for turn in range(a.repeats):
                one_round(bench, work, turn, adapter, results)
                write(a, results, draw=True)
    return 0


def one_round(bench: Bench, work: Work, turn: int, adapter: Path | None, results: Results) -> None:
    a = bench.a
    everyone = contenders.lineup(
        work, a.peer_list if bench.peers else [], a.compile or [None], a.batch_size or 16, a.rows, a.micro_batches
    )
    earlier = [cell for cell in results.cells if cell["round"] < turn]
    for contender in everyone:
        key = {"work": work.name, "contender": contender.name, "rows": contender.rows, "round": turn}
        if contender.name in report.lagging(earlier, work.name) or results.has(key):
            continue
        print(f"{work.name}, round {turn + 1}: {contender.name}, {contender.rows} rows ... ", end="", flush=True)
        cell = key | {"kind": contender.kind} | one_cell(bench, work, contender, adapter, turn)
        results.add(cell)
        print(f"failed: {cell['failed']}" if "failed" in cell else f"{cell['tokens_per_second']:,.0f} tokens/s")
        write(a, results, draw=False)


def one_cell(bench: Bench, work: Work, contender: Contender, adapter: Path | None, turn: int) -> Cell:
    name = f"{work.name}-{turn}-{contender.name}".replace(" ", "_").replace(",", "")
    logs = bench.output / "logs" / name
    before: Cell = {}
    if contender.ours:
        peak = contenders.matmul_peak(bench.model, bench.a.threads, bench.a.dtype, bench.folder / "peak")
        before = {"matmul_peak": peak["matmul_peak"]}
    with machine.Others() as others:
        try:
            cell = contenders.measure(contender, bench.job(work, adapter), logs)
        except RunFailed as error:
            return {"failed": str(error)}
    return before | cell | {"others_cores": others.cores}


def write(a: argparse.Namespace, results: Results, *, draw: bool) -> None:
    losses = read_lines(a.output_dir.resolve() / LOSSES)
    text = report.table(results.header, results.commands, results.cells, losses)
    a.out.write_text(text, encoding="utf-8")
    if draw:
        report.picture(results.header, results.cells, a.out.with_name("results.png"))
        print(f"written: {a.out} and {a.out.with_name('results.png').name}")


if __name__ == "__main__":
    sys.exit(main())

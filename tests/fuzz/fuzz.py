"""`make fuzz`: the same search for longer, with another seed each time. SECONDS a kind; `--kind` for one of them.

Where atheris is installed it drives the readers with coverage; else hypothesis does. A case that fails is written down.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from inputs import FILES
from readers import READERS

from trimtab.data import sandbox

SLOWEST = 20.0


def search(kind: str, seconds: float) -> tuple[int, int, str]:
    """(cases, refused, failure) of one kind."""
    end, cases, refusals = time.monotonic() + seconds, 0, 0

    def look(data: st.DataObject) -> None:
        nonlocal cases, refusals
        file = data.draw(FILES[kind])
        if time.monotonic() > end:
            return
        started = time.process_time()
        try:
            refusals += READERS[kind](file) is not None
        except BaseException:
            Path(f"fuzz-{kind}.bin").write_bytes(file)
            raise
        assert time.process_time() - started < SLOWEST, f"slow: {file[:200]!r}"
        cases += 1

    while time.monotonic() < end:
        run = settings(
            max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate]
        )(seed(random.getrandbits(32))(given(st.data())(look)))
        try:
            run()
        except Exception:
            return cases, refusals, traceback.format_exc()
    return cases, refusals, ""


def driven_by_atheris(kind: str, seconds: float) -> None:
    import atheris  # pyright: ignore[reportMissingImports]

    atheris.instrument_all()
    given_ = given(FILES[kind])(lambda file: READERS[kind](file) and None)
    atheris.Setup([sys.argv[0], f"-max_total_time={int(seconds)}"], given_.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kind", choices=[*READERS])
    given_ = parser.parse_args()
    sandbox.SECONDS, sandbox.SIZE = 0.3, 2**20
    if given_.kind and importlib.util.find_spec("atheris"):
        driven_by_atheris(given_.kind, given_.seconds)
    failed = 0
    for kind in [given_.kind] if given_.kind else READERS:
        cases, refusals, failure = search(kind, given_.seconds)
        print(f"{kind:<16}{cases:>9,} cases, {refusals:,} refused", flush=True)
        if failure:
            print(f"FAILED: the file is fuzz-{kind}.bin\n{failure}", flush=True)
        failed += bool(failure)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())

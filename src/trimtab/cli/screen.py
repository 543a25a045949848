"""What the terminal sees: our lines, errors without a traceback, and nothing of the libraries' own noise."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from trimtab.errors import TrimtabError, TrimtabWarning

# read by the libraries when they are imported, so this must run before torch and transformers are
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}
FAILED, INTERRUPTED = 2, 130


def console(*, stderr: bool = False) -> Console:
    """A pipe has no width: 120 columns there, so that tables and paths are not cut at 80."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False, soft_wrap=False)


def say(line: str, *, style: str = "", stderr: bool = False) -> None:
    """One line as it is: no markup, no wrapping."""
    console(stderr=stderr).print(Text(line, style=style), soft_wrap=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries are silent, `TrimtabWarning`s are one `note:` line each; the user's own settings win."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that nothing here needs
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", TrimtabWarning)
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, TrimtabWarning):
                say(f"note: {message}", style="yellow", stderr=True)
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = note
        yield


@contextmanager
def reported() -> Iterator[list[int]]:
    """Turn what a user can mend into a message and an exit code (put in the list); a bug keeps its traceback."""
    codes: list[int] = []
    try:
        yield codes
    except TrimtabError as problem:
        error(str(problem))
        codes.append(FAILED)
    except BrokenPipeError:
        # `trimtab methods | head`: the reader has gone, so the last flush must have nowhere to fail
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123
        codes.append(0)
    except OSError as problem:
        place = f": {problem.filename}" if problem.filename else ""
        error(f"{problem.strerror or problem}{place}")
        codes.append(FAILED)
    except Exception as problem:
        system = re.search(r"([^:\n]+) \(os error \d+\)", str(problem))  # of libraries in Rust: a full disk, say
        if system is None:
            raise
        error(f"{system[1].strip()}, while a file was written or read")
        codes.append(FAILED)
    except KeyboardInterrupt:
        say("stopped", style="yellow", stderr=True)
        codes.append(INTERRUPTED)


def error(message: str) -> None:
    first, _, rest = message.partition("\n")
    out = console(stderr=True)
    out.print(Text.assemble(("error: ", "bold red"), first), soft_wrap=True)
    if rest:
        out.print(Text(rest), soft_wrap=True)

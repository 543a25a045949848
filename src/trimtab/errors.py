"""The exceptions of trimtab. Each message says what was asked, what was found and what to do.

TrimtabError
├── ConfigError(ValueError)       an option, a YAML key, an adapter config
├── DataError(ValueError)         rows that cannot be right; carries every problem found, each with its place
├── NoMatch(ValueError)           a target, an adapter name or a pattern that names nothing
├── NotSupported(TypeError)       a method on a layer, base or model that cannot carry it
│   └── NotMergeable              ... or cannot be written back into a plain weight
├── BadCheckpoint(ValueError)     an adapter folder that is damaged, unsafe, or belongs to another model
└── TrainingError(RuntimeError)   a run that cannot go on: nothing to train, no labels, a loss that is not finite
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Anything that trimtab itself reports to the user. The command line prints it without a traceback and exits 2."""


class ConfigError(TrimtabError, ValueError): ...


class DataError(TrimtabError, ValueError): ...


class NoMatch(TrimtabError, ValueError): ...


class NotSupported(TrimtabError, TypeError): ...


class NotMergeable(NotSupported): ...


class BadCheckpoint(TrimtabError, ValueError): ...


class TrainingError(TrimtabError, RuntimeError): ...


class TrimtabWarning(UserWarning):
    """One line about something that was decided for the user. Tests turn it into an error unless they expect it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'q_proj'?` when a known word is close to `word`, else the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""

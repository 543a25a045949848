"""What is begun and fails is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def undone(undo: Callable[..., Any], *args: Any) -> Iterator[None]:
    """`undo(*args)` where the body does not come to its end, for whatever reason, Ctrl-C included; the reason goes on up."""
    try:
        yield
    except BaseException:
        undo(*args)
        raise

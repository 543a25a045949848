"""Values from a file, held against the types that a field declares. A file is data: nothing in it is believed."""

from __future__ import annotations

import math
import re
import types
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from trimtab.errors import BadCheckpoint

PATTERNS = 2_000  # characters of a pattern
LOOPS = 6  # open-ended repeats in one pattern


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is one that `hint` allows. Whole numbers may be written as `16` or as `16.0`."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin in (list, set, tuple) and args:
        return isinstance(value, (list, set, tuple)) and all(fits(v, args[0]) for v in cast("list[Any]", value))
    if origin is dict and args:
        pairs = cast("dict[Any, Any]", value).items() if isinstance(value, dict) else None
        return pairs is not None and all(fits(k, args[0]) and fits(v, args[1]) for k, v in pairs)
    if origin is float:
        return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)
    if origin is int:
        return type(value) in (int, float) and abs(value) < 2**63 and value == int(value)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def check(kind: type, values: dict[str, Any], where: str) -> None:
    """Raise `BadCheckpoint` where a value has another type than the field of `kind` that it is for, or holds a pattern that
    could be matched for ever."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise BadCheckpoint(f"{where}: {name} is {repr(value)[:80]}, which is no value of that option")
        texts: Any = value if isinstance(value, dict) else [value]
        for text in texts if name.endswith(("modules", "pattern")) else []:
            if isinstance(text, str) and (why := endless(text)):
                raise BadCheckpoint(f"{where}: {name}: the pattern {text[:80]!r} {why}")


def endless(pattern: str) -> str:
    """Why a regular expression could take for ever, or the empty string. One that is not valid is its reader's to refuse."""
    if len(pattern) > PATTERNS:
        return f"has {len(pattern):,} characters; {PATTERNS:,} are allowed"
    try:
        parser: Any = getattr(re, "_parser", None) or __import__("sre_parse")
        loops = _loops(parser.parse(pattern), inside=False)
    except (re.error, RecursionError, OverflowError):
        return ""
    if loops is None:
        return "repeats what repeats or branches, which can take for ever to match"
    return f"has {loops} open-ended repeats; {LOOPS} are allowed" if loops > LOOPS else ""


def _loops(parsed: Any, *, inside: bool) -> int | None:
    """The most open-ended repeats on one way through a pattern; None where one holds another, or a branch."""
    total = 0
    for op, argument in parsed:
        kind = str(op)
        if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            many = argument[1] > 16
            inner = _loops(argument[2], inside=inside or many)
            if inner is None or (inside and many):
                return None
            total += inner + many
        elif kind == "BRANCH":
            ways = [_loops(way, inside=inside) for way in argument[1]]
            if inside or None in ways:
                return None
            total += max(cast("list[int]", ways), default=0)
        elif kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP", "GROUPREF_EXISTS"):
            parts = argument if isinstance(argument, (list, tuple)) else [argument]
            for part in parts if kind != "ATOMIC_GROUP" else [argument]:
                if hasattr(part, "data"):
                    inner = _loops(part, inside=inside)
                    if inner is None:
                        return None
                    total += inner
    return total

"""Values as people write them (`1e-4`, `q_proj,v_proj`, `off`), turned into the type that a field declares."""

from __future__ import annotations

import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from trimtab.cli.yamlfile import PlainLoader
from trimtab.errors import nearest

TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_UNIONS = (Union, types.UnionType)
# `target_modules: str` is a regex over whole paths; a plain word can only be meant as the name of a module
_NAME = re.compile(r"[\w.]+")
_RANK = {bool: 0, int: 1, float: 2, list: 3, dict: 4, Literal: 5, str: 6}


def is_union(hint: Any) -> bool:
    return get_origin(hint) in _UNIONS


def is_bool(hint: Any) -> bool:
    """Can a flag of this type stand without a value? Not where a word is a value too: `init_lora_weights gaussian`."""
    return hint is bool or (is_union(hint) and bool in get_args(hint) and str not in get_args(hint))


def describe(hint: Any) -> str:
    """The type in a reader's words: `a whole number`, `one of drop, error`."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in _UNIONS:
        kinds = [a for a in args if a is not types.NoneType and not (a is int and float in args)]
        return " or ".join(dict.fromkeys(describe(a) for a in sorted(kinds, key=_rank)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    return names.get(origin, "a list" if origin in (list, tuple, set) else "a value")


def convert(value: Any, hint: Any, *, split: bool = True) -> Any:
    """`value` as `hint`, or ValueError with what was expected. `split`: commas separate the items of a list."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return _parsed(value)
    if origin in _UNIONS:
        return _any_of(value, args, hint, split)
    if origin is Literal:
        return _choice(value, args)
    make = {bool: _bool, int: _int, float: _float, str: _str, dict: _dict}.get(origin)
    if make:
        return make(value)
    if origin in (list, tuple, set):
        item = args[0] if args else str
        return origin(convert(v, item) for v in _items(value, split))
    return value


def _rank(hint: Any) -> int:
    return _RANK.get(get_origin(hint) or hint, 3)


def _any_of(value: Any, args: tuple[Any, ...], hint: Any, split: bool) -> Any:
    if types.NoneType in args and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    kinds = sorted((a for a in args if a is not types.NoneType), key=_rank)
    if isinstance(value, str) and any(get_origin(k) is list for k in kinds) and str in kinds:
        names = [v.strip() for v in value.split(",")]
        as_list = value != "all-linear" and all(map(_NAME.fullmatch, names))
        kinds = [k for k in kinds if (get_origin(k) is list) == as_list and k is not (str if as_list else None)]
    for kind in kinds:
        try:
            return convert(value, kind, split=split)
        except ValueError as problem:
            if len(kinds) == 1:
                raise problem
    raise _wrong(value, describe(hint))


def _wrong(value: Any, expected: str) -> ValueError:
    return ValueError(f"expected {expected}, got {value!r}")


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return yaml.load(value, PlainLoader)  # a SafeLoader without aliases
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"{value[:80]!r} is not YAML") from None
    except Exception as error:  # a date of month 13, a number of 5,000 digits
        raise ValueError(f"not a value: {str(error)[:200]}") from None


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice or str(value).lower() == str(choice).lower():
            return choice
    expected = ", ".join(map(str, choices))
    raise ValueError(f"expected one of {expected}; got {value!r}.{nearest(str(value), map(str, choices))}")


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if word not in TRUE | FALSE:
        raise _wrong(value, "true or false")
    return word in TRUE


def _float(value: Any) -> float:
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise _wrong(value, "a number")


def _int(value: Any) -> int:
    try:
        number = _float(value)  # `max_steps: 1e3` is a whole number too
        if number == int(number):
            return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)
    except (ValueError, OverflowError):
        pass
    raise _wrong(value, "a whole number")


def _str(value: Any) -> str:
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    raise _wrong(value, "text")


def _dict(value: Any) -> dict[Any, Any]:
    try:
        parsed = _parsed(value)
    except ValueError:
        parsed = None
    if isinstance(parsed, dict):
        return parsed
    raise _wrong(value, "a mapping such as {q_proj: 16}")


def _items(value: Any, split: bool) -> list[Any]:
    """A string is a comma-separated list (or one item); a list may hold such strings, from a repeated flag."""
    if value is None:
        return []
    values = list(value) if isinstance(value, list | tuple | set) else [value]
    if not split:
        return values
    return [part for v in values for part in (_parts(v) if isinstance(v, str) else [v])]


def _parts(text: str) -> list[str]:
    return [p.strip() for p in text.strip().removeprefix("[").removesuffix("]").split(",") if p.strip()]

"""Flags and a flat YAML file, resolved to one `TrainOptions`. All problems are collected and shown together.

Names come from `TrainOptions` and from the chosen adapter's config class; nothing is listed here a second time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from trimtab.cli import spellings
from trimtab.cli.values import FALSE, TRUE, convert, is_bool
from trimtab.cli.yamlfile import Given, read_yaml
from trimtab.errors import ConfigError, TrimtabError, nearest
from trimtab.train.batches import ranks
from trimtab.train.options import TrainOptions

PROSE = {"sample_prompts"}  # lists whose items may hold commas: one item a flag
_HINTS = get_type_hints(TrainOptions)


@dataclass(frozen=True)
class Extra:
    """An option that belongs to one command alone."""

    hint: Any
    default: Any
    help: str


@dataclass
class Settings:
    """What the user asked for: the run, the command's own options, and how each spelling was understood."""

    options: TrainOptions
    extras: dict[str, Any]
    given: dict[str, str] = field(default_factory=dict)  # name -> where it was said
    notes: list[str] = field(default_factory=list)


def resolve(args: list[str], extras: dict[str, Extra] | None = None, *, positional: str = "dataset") -> Settings:
    """`args` as typed after the command; bare words are the value of the option `positional`."""
    extras = extras or {}
    reader = _Reader(extras)
    flags, words = reader.flags(args)
    from_file: list[Given] = []
    for config in [g for g in flags if g.key == "config"]:
        given, problems = read_yaml(Path(str(config.value)))
        from_file += given
        reader.problems += problems
    if words:
        flags.append(Given(positional, words if positional == "dataset" else words[0], "the command line"))
        if positional != "dataset" and len(words) > 1:
            reader.problems.append(f"unexpected {' '.join(words[1:])!r}: this command takes one {positional}")
    chosen = reader.merged(from_file) | reader.merged([g for g in flags if g.key != "config"])
    reader.batch(chosen)
    settings = reader.settled(chosen)
    if reader.problems:
        raise ConfigError(_together(reader.problems))
    return settings


def adapter_fields(name: str) -> dict[str, dataclasses.Field[Any]]:
    """A method's own fields; those that every config has describe the file, and are not asked of a user."""
    from trimtab.core.config import PeftConfig, config_class

    common = {f.name for f in dataclasses.fields(PeftConfig)}
    return {f.name: f for f in dataclasses.fields(config_class(name)) if f.name not in common}


def _together(problems: Iterable[str]) -> str:
    problems = list(dict.fromkeys(problems))
    return problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n" + "\n".join(f"  {p}" for p in problems)


class _Reader:
    """One reading of the options. Problems are gathered, so that a file with three typos takes one round, not three."""

    def __init__(self, extras: dict[str, Extra]) -> None:
        self.extras = extras
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.said: dict[str, str] = {}  # ours -> as it was spelled

    # ---- flags

    def flags(self, args: list[str]) -> tuple[list[Given], list[str]]:
        """`--key value`, `--key=value`, `--switch`, `--no-switch`; anything else is a bare word."""
        given: dict[str, Given] = {}
        words: list[str] = []
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            if arg == "--":
                words += rest
                break
            if not arg.startswith("--"):
                if re.match(r"-[A-Za-z]", arg):  # else its value would be taken for a data file
                    self.problems.append(f"{arg}: unknown; options begin with two dashes, as in --model FOLDER")
                words.append(arg)
                continue
            flag, equals, value = arg.partition("=")
            key = flag[2:].replace("-", "_")
            if equals:
                self._give(given, Given(key, value, flag))
            elif self._switch(key):
                taken = rest.pop(0) if rest and rest[0].lower() in TRUE | FALSE | {"auto"} else True
                self._give(given, Given(key, taken, flag))
            elif key.startswith("no_") and self._switch(key[3:]):
                self._give(given, Given(key[3:], False, flag))
            elif rest and not rest[0].startswith("--"):
                self._give(given, Given(key, rest.pop(0), flag))
            elif self._known(key):
                self.problems.append(f"{flag}: needs a value, as in {flag} VALUE")
            else:
                self._give(given, Given(key, True, flag))  # reported as unknown, with everything else
        return list(given.values()), words

    def _give(self, given: dict[str, Given], new: Given) -> None:
        """A repeated flag adds to a list; said twice, a single value has no right answer."""
        old = given.get(new.key)
        if old is None:
            given[new.key] = new
        elif isinstance(old.value, list) or self._listed(new.key):
            values = old.value if isinstance(old.value, list) else [old.value]
            given[new.key] = Given(new.key, [*values, new.value], new.place)
        else:
            self.problems.append(f"{new.place}: given twice ({old.value!r}, then {new.value!r}); keep one")

    def _hint(self, key: str) -> Any:
        if key in self.extras:
            return self.extras[key].hint
        if key in _HINTS:
            return _HINTS[key]
        return _any_adapter_hints().get(key)

    def _known(self, key: str) -> bool:
        return key in spellings.KNOWN or key == "config" or self._hint(key) is not None

    def _switch(self, key: str) -> bool:
        if key in spellings.SWITCHES:
            return True
        return is_bool(self._hint(spellings.RENAMED.get(key, key)))

    def _listed(self, key: str) -> bool:
        return "list" in str(self._hint(spellings.RENAMED.get(key, key)))

    # ---- other tools' spellings

    def merged(self, given: list[Given]) -> dict[str, Given]:
        """One source under our names. Two spellings of one option must agree."""
        chosen: dict[str, Given] = {}
        for one in given:
            if one.key in self.extras:
                chosen[one.key] = one
                continue
            for key, value in self._translated(one).items():
                old = chosen.get(key)
                if old is not None and old.value != value:
                    self.problems.append(
                        f"{one.place}: {one.key} says {key} = {value!r}, but {old.place} says {old.value!r}; keep one"
                    )
                chosen.setdefault(key, Given(key, value, one.place))
                self.said[key] = one.key
        return chosen

    def _translated(self, one: Given) -> dict[str, Any]:
        try:
            ours = spellings.translate(one)
        except ValueError as problem:
            self.problems.append(f"{one.place}: {one.key}: {problem}")
            return {}
        if ours != {one.key: one.value}:
            same = one.key in spellings.RENAMED and list(ours.values()) == [one.value]
            theirs = one.key if same else f"{one.key} {one.value}"
            self.notes.append(f"{theirs} -> {_shown(ours) if ours else 'nothing to change here'}")
        return ours

    def batch(self, chosen: dict[str, Given]) -> None:
        """`micro x accumulation` is the batch of an optimizer step, which is what `batch_size` says here."""
        whole, micro = chosen.get("batch_size"), chosen.get("micro_batch_size")
        device, steps, other = (chosen.pop(key, None) for key in spellings.BATCH)
        steps = steps or other
        try:
            if device and micro:
                twice = f"{device.key} and micro_batch_size ({micro.place}) say the same; keep one"
                raise ValueError(f"{device.place}: {twice}")
            micro = device or micro
            if device is None and steps is None:
                return
            found = _batch(whole, micro, steps)
        except ValueError as problem:
            self.problems.append(str(problem))
            return
        said = " x ".join(f"{g.key} {g.value}" for g in (whole if steps and not micro else None, micro, steps) if g)
        said += f" on {ranks()} processes" if ranks() > 1 else ""
        self.notes.append(f"{said} -> {_shown(found)}")
        place = (steps or micro or whole).place  # type: ignore[union-attr]
        chosen.update({k: Given(k, v, place) for k, v in found.items()})

    # ---- types

    def settled(self, chosen: dict[str, Given]) -> Settings:
        self._warmup(chosen)
        name = chosen.get("adapter")
        adapter = str(name.value) if name else TrainOptions().adapter
        fields = self._fields(adapter, name)
        own = {f: h for f, h in _config_hints(adapter).items() if f in fields} if fields else {}
        values: dict[str, dict[str, Any]] = {"run": {}, "adapter": {}, "extra": {}}
        for key, one in chosen.items():
            if key in self.extras:
                self._put(values["extra"], one, self.extras[key].hint)
            elif key in _HINTS and key != "adapter_options":
                self._put(values["run"], one, _HINTS[key])
            elif key in own:
                self._put(values["adapter"], one, own[key])
            elif (said := self.said.get(key, key)) in own:  # the method has one of that very name: `dropout`
                self.notes = [note for note in self.notes if not note.startswith(f"{said} -> ")]
                self._put(values["adapter"], Given(said, one.value, one.place), own[said])
            elif fields is not None:
                self.problems.append(self._unknown(one, adapter, own))
        try:
            options = TrainOptions(**values["run"], adapter_options=values["adapter"])
        except TrimtabError as problem:
            self.problems += str(problem).splitlines()
            options = TrainOptions()
        extras = {k: e.default for k, e in self.extras.items()} | values["extra"]
        return Settings(options, extras, {k: g.place for k, g in chosen.items()}, self.notes)

    def _put(self, into: dict[str, Any], one: Given, hint: Any) -> None:
        split = one.key not in PROSE and one.place != "the command line"
        try:
            into[one.key] = convert(one.value, hint, split=split)
        except ValueError as problem:
            self.problems.append(f"{one.place}: {one.key}: {problem}")

    def _fields(self, adapter: str, name: Given | None) -> dict[str, Any] | None:
        try:
            return adapter_fields(adapter)
        except ConfigError as problem:
            self.problems.append(f"{name.place if name else 'adapter'}: {problem}")
            return None

    def _unknown(self, one: Given, adapter: str, own: Iterable[str]) -> str:
        if one.key in _any_adapter_hints():
            return f"{one.place}: {one.key} is not an option of the adapter {adapter!r}. Its own: {', '.join(own)}"
        known = [*_HINTS, *own, *self.extras, *spellings.KNOWN]
        close = nearest(one.key, known)
        return f"{one.place}: unknown option {one.key!r}.{close or ' All of them: trimtab train --help'}"

    def _warmup(self, chosen: dict[str, Given]) -> None:
        """A number of warm-up steps is a share only when the number of steps is known beforehand."""
        steps, total = chosen.pop("warmup_steps", None), chosen.get("max_steps")
        if steps is None:
            return
        try:
            n = convert(steps.value, float)
            whole = convert(total.value, int) if total else 0
            if n >= 1 and whole <= 0:
                raise ValueError("warm-up is a share of the steps here; say warmup_ratio (0.03), or max_steps as well")
        except ValueError as problem:
            self.problems.append(f"{steps.place}: warmup_steps: {problem}")
            return
        ratio = n / whole if n >= 1 else n
        self.notes.append(f"warmup_steps {steps.value} -> warmup_ratio {ratio:g}")
        chosen.setdefault("warmup_ratio", Given("warmup_ratio", ratio, steps.place))


def _batch(whole: Given | None, micro: Given | None, steps: Given | None) -> dict[str, int]:
    def number(given: Given | None) -> int | None:
        try:
            return None if given is None else convert(given.value, int)
        except ValueError as problem:
            raise ValueError(f"{given.place}: {given.key}: {problem}") from None  # type: ignore[union-attr]

    b, m, n = number(whole), number(micro), number(steps) or 1
    each = n * ranks()  # a step is over all processes, a micro-batch is of one
    if b is not None and steps and whole and steps.place != whole.place and _file(steps) and not _file(whole):
        return {"batch_size": b} | ({"micro_batch_size": m} if m else {})  # the flag overrules the file's product
    if m is not None and b is not None and steps is not None and m * each != b:
        many = f" on {ranks()} processes" if ranks() > 1 else ""
        raise ValueError(f"{whole.place}: batch_size {b} is not {micro.key} {m} x {steps.key} {n}{many}; leave one out")  # type: ignore[union-attr]
    if m is not None:
        return {"batch_size": b if b is not None else m * each, "micro_batch_size": m}
    b = b if b is not None else TrainOptions().batch_size
    if n < 1 or b % each:
        raise ValueError(f"{steps.place}: batch_size {b} cannot be split into {each} equal parts; say batch_size as well")  # type: ignore[union-attr]
    return {"batch_size": b, "micro_batch_size": b // each}


def _file(given: Given) -> bool:
    return not given.place.startswith("-")


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in options.items())


def _config_hints(adapter: str) -> dict[str, Any]:
    from trimtab.core.config import config_class

    return get_type_hints(config_class(adapter))


_hints_of_all: dict[str, Any] = {}


def _any_adapter_hints() -> dict[str, Any]:
    """Fields of every method: which words are flags must be known before the adapter's name is."""
    if not _hints_of_all:
        from trimtab.core.config import methods

        for name in methods():
            hints = _config_hints(name)
            _hints_of_all.update({f: hints[f] for f in adapter_fields(name)})
    return _hints_of_all

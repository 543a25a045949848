"""A flat YAML file as (key, value, file:line), with every problem it has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import ConfigError

LONGEST = 1_000_000  # bytes


@dataclass(frozen=True)
class Given:
    """One option as the user wrote it, and where: `run.yaml:3` or `--lora_r`."""

    key: str
    value: Any
    place: str


class PlainLoader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number (YAML 1.1 asks for `1.0e-4`). No aliases: a few lines of them can stand
    for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) have no use in options", problem_mark=mark)
        return super().compose_node(parent, index)


# copied, because yaml keeps one table for all loaders and prepending to it would change yaml.safe_load everywhere
PlainLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> tuple[list[Given], list[str]]:
    """The file's options in order, and its problems. A key given twice is one: it has no right answer."""
    try:
        loader = PlainLoader(_text(path))
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    try:
        root = loader.get_single_node()
        if root is None:
            return [], []
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise ConfigError(f"{path}:1: expected `option: value` lines, found {kind}")
        given, seen, problems = [], {}, []
        for key_node, value_node in root.value:
            key = str(key_node.value).replace("-", "_")
            line = key_node.start_mark.line + 1
            if key in seen:
                problems.append(f"{path}:{line}: {key} is given twice (first on line {seen[key]}); keep one")
                continue
            seen[key] = line
            try:
                given.append(Given(key, loader.construct_object(value_node, deep=True), f"{path}:{line}"))
            except (yaml.YAMLError, RecursionError):
                raise
            except Exception as error:  # a date of month 13, a number of 5,000 digits, a word tagged as one
                why = str(error).splitlines() or [type(error).__name__]
                problems.append(f"{path}:{line}: {key}: not a value: {why[0][:200]}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; options are flat `option: value` lines") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    finally:
        loader.dispose()
    return given, problems


def _text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"--config {path} is a folder; give the YAML file itself")
    try:
        if path.stat().st_size > LONGEST:
            raise ConfigError(f"--config {path} has {path.stat().st_size:,} bytes: options are a few lines of YAML")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file (looked in {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None

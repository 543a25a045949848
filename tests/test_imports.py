"""The layers of the package: who may import whom. Read off the sources, so that a cycle is caught before it runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "trimtab"

# each layer may import those before it; parts of one layer may not import each other
LAYERS: list[set[str]] = [
    {"errors"},
    {"files", "headers", "typed", "call", "targets", "masters", "undone"},
    {"core"},
    {"states"},
    {"bases", "inits"},
    {"methods"},  # LoRA starts by an init
    {"fused", "store", "optim", "origin", "bounded", "mergeable"},
    {"deltas"},
    {"blend", "mixed", "cartridges", "scalings", "vocabulary"},
    {"verbs"},
    {"status", "convert", "hotswap", "inject"},
    {"model"},
    {"auto", "experts"},
    {"engine"},
    {"evaluate"},
    {"train"},
    {"export"},  # a merge loads the base in the form that the run trained on, as train.load does
    {"serve", "doctor"},
    {"cli", "ui"},
    {"__main__"},
]
# beside the ladder: data stands on errors alone, whatever trains, answers or shows may use it; demo is rows and a model
# for the command line; options name a run for both
APART = {"data": {"errors"}, "demo": {"errors"}}
DATA_USERS = {"engine", "train", "evaluate", "export", "serve", "doctor", "cli", "ui"}
# code that must run where transformers is absent, or must not know it
NO_TRANSFORMERS = {
    "errors", "files", "headers", "typed", "origin", "bounded", "core", "bases", "inits", "store", "deltas", "blend",
    "mergeable",
}  # fmt: skip
# imported inside functions of their own file only
VENDORS = set("bitsandbytes hqq auto_gptq gptqmodel awq torchao gguf peft trl deepspeed wandb".split())


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def part(root: Path, file: Path) -> str:
    """`core` for src/trimtab/core/ops.py, `store` for src/trimtab/store.py."""
    return file.relative_to(root).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_level: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each import that runs; those under `if TYPE_CHECKING` do not."""
    nodes: list[ast.AST] = list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes += node.orelse
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)


def allowed(name: str) -> set[str] | None:
    """The parts that `name` may import; None: a part that the design does not know."""
    if name in APART:
        return APART[name] | {name}
    for depth, layer in enumerate(LAYERS):
        if name in layer:
            below = set().union(*LAYERS[:depth])
            return below | {name} | ({"data"} if name in DATA_USERS else set()) | ({"demo"} if name == "cli" else set())
    return None


def violations(root: Path) -> list[str]:
    found = []
    for file in files(root):
        name, tree = part(root, file), ast.parse(file.read_text(encoding="utf-8"))
        if name == "__init__":
            continue  # the public door: it imports what it shows
        may = allowed(name)
        if may is None:
            found.append(f"{file.relative_to(root)}: {name!r} has no place in LAYERS")
            continue
        for module, line in imports(tree):
            owner, _, rest = module.partition(".")
            place = f"{file.relative_to(root)}:{line}"
            if owner == "trimtab" and (target := rest.partition(".")[0]) not in may and target in known():
                found.append(f"{place}: {name} must not import {target}")
            if owner == "peft":
                found.append(f"{place}: peft is an oracle for tests; the library never imports it")
            free = name in NO_TRANSFORMERS or (name == "methods" and "prompt" not in file.parts)
            if owner == "transformers" and free:
                found.append(f"{place}: {name} must not import transformers")
        for module, line in imports(tree, top_level=True):
            if module.partition(".")[0] in VENDORS:
                found.append(f"{file.relative_to(root)}:{line}: {module} is imported at the top of the file")
    return found


def known() -> set[str]:
    return set().union(*LAYERS) | set(APART)


def test_the_package_keeps_its_layers() -> None:
    assert violations(SRC) == []


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("core/ops.py", "from trimtab.methods import lora", "core must not import methods"),
        ("methods/lora.py", "import trimtab.model", "methods must not import model"),
        ("evaluate/loss.py", "from trimtab.train.run import run", "evaluate must not import train"),
        ("data/read.py", "def f():\n    from trimtab.core import sites", "data must not import core"),
        ("core/base.py", "import transformers", "core must not import transformers"),
        ("methods/lora.py", "from transformers import Trainer", "methods must not import transformers"),
        ("bases/bnb4.py", "import bitsandbytes", "bitsandbytes is imported at the top of the file"),
        ("model.py", "def f():\n    import peft", "peft is an oracle"),
        ("gadgets/x.py", "", "has no place in LAYERS"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, code: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code, encoding="utf-8")
    assert [v for v in violations(tmp_path) if message in v]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("methods/prompt/x.py", "import transformers"),
        ("bases/bnb4.py", "def f():\n    import bitsandbytes"),
        ("core/adapter.py", "if TYPE_CHECKING:\n    from trimtab.model import PeftModel"),
        ("train/run.py", "from trimtab.data import read\nfrom trimtab.evaluate import loss"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []


def test_the_door_shows_what_its_types_say() -> None:
    """Each public name is imported for type checkers and found at run time, in the same place."""
    import trimtab

    said: dict[str, str] = {}
    for node in ast.walk(ast.parse((SRC / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trimtab."):
            said.update({alias.name: node.module for alias in node.names})
    assert sorted(said) == sorted(trimtab.__all__)
    assert {name: getattr(trimtab, name).__module__ for name in said} == said
    with pytest.raises(AttributeError, match="LoraConfg"):
        _ = trimtab.LoraConfg


def test_the_door_knows_every_methods_config() -> None:
    import trimtab
    from trimtab.core.config import load, methods

    for config in {load(name).config for name in methods()}:
        assert getattr(trimtab, config.__name__) is config


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, trimtab, trimtab.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

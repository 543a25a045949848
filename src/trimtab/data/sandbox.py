"""Chat templates are programs of somebody else's: they run in Jinja's sandbox, and within a bound of time and size.

The sandbox keeps a template from Python's insides; it does not keep it from looping for ever or from making a text of a
gigabyte. Here the tree of a template is given two kinds of extra nodes before it is compiled: each loop asks the clock,
and each literal that holds other values is weighed. Operators, filters and calls that can make much of little are
checked before they run. The environment (filters, globals, extensions) is the one transformers makes.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from trimtab.errors import DataError

SECONDS = 10.0  # for one conversation; real templates take milliseconds
SIZE = 2**26  # characters or values that may stand in one result
NUMBER = 10_000  # the widest padding, the deepest indent
BITS = 100_000  # of a whole number
SOURCE = 2**20  # characters of a template

# filters and methods whose whole numbers are widths or counts
_WIDTHS = set("center indent wordwrap batch slice truncate tojson round ljust rjust zfill".split())
_NEVER = {"expandtabs", "translate"}
_STRETCHED = re.compile(r"\d{6}|[%:][^{}%]*\*|:[^{}]*\{")  # a width of six digits, or one that is an argument


class _Guarded(NodeTransformer):
    """Puts the checks into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None), "trimtab_tick")).set_lineno(node.lineno))
        return node

    def _weighed(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        in_code = getattr(node, "ctx", "load") == "load"
        plain = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return _filtered(node, "trimtab_weigh") if in_code and not plain else node

    visit_Concat = visit_List = visit_Tuple = visit_Dict = _weighed

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        node.node = self.visit(node.node)
        return node

    def visit_Slice(self, node: nodes.Slice) -> nodes.Node:
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        node.value = self.visit(node.value)
        return node


def _filtered(node: Any, name: str) -> nodes.Node:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno or 1)


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a clock and a scale. Raises `SecurityError` where a template goes past them."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, like: Any) -> None:
        """`like`: the environment whose filters, globals and extensions it takes over."""
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            extensions=[type(e) for e in like.extensions.values()],
        )
        self.clock = threading.local()
        self.globals.update(like.globals)
        self.globals.pop("lipsum", None)  # any number of paragraphs
        self.filters = {name: self._checked(name, call) for name, call in like.filters.items()}
        self.filters["trimtab_tick"] = pass_context(lambda context, value: self.tick())
        self.filters["trimtab_weigh"] = self.weigh
        self.concat = self._joined  # type: ignore[method-assign]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise SecurityError(f"the chat template has {len(source):,} characters; {SOURCE:,} are allowed")
        tree: Any = _Guarded().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def rendered(self, template: Any, **values: Any) -> str:
        """The template's text for these values, within the bounds."""
        self.clock.end = time.monotonic() + SECONDS
        return template.render(**values)

    # ---- the checks

    def tick(self) -> None:
        if time.monotonic() > getattr(self.clock, "end", float("inf")):
            raise SecurityError(f"the chat template was stopped after {SECONDS:g} seconds")

    def weigh(self, value: Any) -> Any:
        """`value`, if what it holds, counted as often as it is held, stays below `SIZE`."""
        if not isinstance(value, (str, bytes, list, tuple, dict)):
            return value
        size, rest = 0, [value]
        while rest:
            one = rest.pop()
            if isinstance(one, dict):
                rest += [*one, *one.values()]
            elif isinstance(one, (list, tuple)):
                rest += one
            size += len(one) + 1 if isinstance(one, (str, bytes)) else 8
            if size + len(rest) > SIZE:
                raise SecurityError(f"the chat template makes a value of more than {SIZE:,} characters")
        self.tick()
        return value

    def _joined(self, pieces: Iterable[str]) -> str:
        out: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > SIZE:
                raise SecurityError(f"the chat template writes more than {SIZE:,} characters")
            self.tick()
            out.append(piece)
        return "".join(out)

    def _checked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def checked(*args: Any, **kwargs: Any) -> Any:
            at = 2 if hasattr(call, "jinja_pass_arg") else 1  # where what is filtered stands, and before it a context
            self._guard(name, args[at - 1 : at], [*args[at:], *kwargs.values()])
            return self.weigh(call(*args, **kwargs))

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(__obj, "__name__", "")
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # Jinja wraps str.format
        __self._guard(name, (owner,), [*args, *kwargs.values()])
        return __self.weigh(super().call(__context, __obj, *args, **kwargs))

    def _guard(self, name: str, owner: tuple[Any, ...], args: list[Any]) -> None:
        """Before a filter or a call: what it would make of its arguments."""
        self.tick()
        first = owner[0] if owner else None
        if name in _NEVER:
            raise SecurityError(f"a chat template has no use for {name}()")
        if name in _WIDTHS and any(isinstance(a, (int, float)) and abs(a) > NUMBER for a in args):
            raise SecurityError(f"{name}() with a number above {NUMBER:,} in a chat template")
        if name == "replace" and isinstance(first, str) and len(args) > 1:
            old, new = str(args[0]), str(args[1])
            self._room(first.count(old) * len(new))
        elif name == "join":
            between, parts = (first, args and args[0]) if isinstance(first, str) else (args[0] if args else "", first)
            count = len(parts) if isinstance(parts, Sized) else 10**6
            self._room(count * len(str(between)))
        elif name in ("format", "format_map") and isinstance(first, str):
            self._format(first)

    def _format(self, text: str) -> None:
        if _STRETCHED.search(text):
            raise SecurityError("a format with a width that long, or that is computed, in a chat template")

    def _room(self, size: int) -> None:
        if size > SIZE:
            raise SecurityError(f"the chat template makes a text of more than {SIZE:,} characters")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, bytes, list, tuple)) and isinstance(other, int):
                    self._room(len(one) * other)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise SecurityError("a number that long in a chat template")
        if operator == "%" and isinstance(left, (str, bytes)):
            self._format(str(left))
        value = super().call_binop(context, operator, left, right)
        return self.weigh(value) if operator in "*+%" and not isinstance(value, (int, float)) else value


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> tuple[Bounded, Any]:
    """A chat template ready to be rendered, and its environment."""
    from transformers.utils import chat_template_utils

    environment = Bounded(chat_template_utils._compile_jinja_template("").environment)  # type: ignore[no-untyped-call]
    return environment, environment.from_string(source)


def check(source: Any) -> None:
    """Raise `DataError` for a template that is none: a fault of its own, and not of each row that it would render."""
    try:
        if isinstance(source, str):
            compiled(source)
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template, line {error.lineno}: {error.message}. Fix: correct it, or pass another "
                        "chat_template (chatml, a .jinja file)") from error
    except (SecurityError, RecursionError):
        return  # rendering says so


def render(tokenizer: Any, messages: Any, tools: Any, chat_template: str | None, opened: bool) -> str:
    """What `tokenizer.apply_chat_template(tokenize=False)` gives, within the bounds."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils as theirs

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # its own way, no template
        own: str = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=chat_template, add_generation_prompt=opened, tokenize=False
        )
        return own
    same = lambda value: value  # noqa: E731
    plain = getattr(theirs, "_plain_template_data", same)
    talk = getattr(theirs, "_alias_reasoning_fields", same)(
        plain(getattr(theirs, "_normalize_chat_messages", same)(messages))
    )
    environment, template = compiled(tokenizer.get_chat_template(chat_template, tools))
    values = {"messages": talk, "tools": plain(tools), "documents": None, "add_generation_prompt": opened}
    return environment.rendered(template, **values, **plain(dict(tokenizer.special_tokens_map)))

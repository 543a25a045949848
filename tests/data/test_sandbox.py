"""Chat templates from strangers: rendered as transformers renders them, and stopped where they loop or swell."""

from __future__ import annotations

import time
import warnings

import pytest

from trimtab.data import Renderer, sandbox
from trimtab.data.templates import BUILT_IN
from trimtab.errors import DataError

from . import tiny

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hi {{ x }} <|im_end|> \n"},
    {"role": "assistant", "content": "Yes\u2028ö"},
    {"role": "user", "content": "And?", "name": None},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATES = {
    **BUILT_IN,
    **{k: v for k, v in vars(tiny).items() if k.isupper() and isinstance(v, str) and "{%" in v},
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "many": "{% set ns = namespace(a=[], n=0) %}{% for m in messages recursive %}{% if m.role == 'user' %}{% continue %}"
    "{% endif %}{% set ns.a = ns.a + [m.content, loop.length, loop.last] %}{% endfor %}{{ ns.a | tojson(indent=2) }}"
    "{{ dict(a=1, b=[1, 2]) | items | list }}{{ '%s-%03d' % ('a', 5) }}{{ 'x' * 3 ~ 4 }}{{ messages[1:] | length }}"
    "{%- macro f(x, y=[]) %}({{ x | trim | replace('H', 'J') }}{{ y | join(', ') }}){% endmacro %}{{ f(messages[1].content, "
    "y=['a', 'b']) }}{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }}{% endfor %}{{ {'k': messages[0].role} }}{{ 2 ** 10 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_it_renders_as_transformers_does(name: str, tools: list[dict] | None) -> None:
    tokenizer = tiny.tokenizer(TEMPLATES[name])
    for talk in (TALK, TALK[1:], TALK[1:3], TALK[:2]):
        for opened in (False, True):
            try:
                want = tokenizer.apply_chat_template(talk, tools=tools, add_generation_prompt=opened, tokenize=False)
            except Exception as refused:
                with pytest.raises(type(refused)):
                    sandbox.render(tokenizer, talk, tools, None, opened)
            else:
                assert sandbox.render(tokenizer, talk, tools, None, opened) == want


def test_tools_have_a_template_of_their_own() -> None:
    tokenizer = tiny.tokenizer(tiny.CHATML)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    assert sandbox.render(tokenizer, TALK, None, None, False) == "plain"
    assert sandbox.render(tokenizer, TALK, TOOLS, None, False) == "with tools"


BOMBS = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}{% endfor %}{% endfor %}",
    "endless, silent": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "gigabyte": "{{ 'x' * 2 ** 30 }}",
    "folded": "{{ 'x' * 1073741824 }}",
    "tilde": "{% set ns = namespace(s='x') %}{% for i in range(34) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "plus": "{% set ns = namespace(s='x') %}{% for i in range(34) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "blocks": "{% set ns = namespace(s='x') %}{% for i in range(34) %}{% set y %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = y %}{% endfor %}",
    "lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "dicts": "{% set ns = namespace(s={}) %}{% for i in range(60) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}"
    "{% endfor %}{{ ns.s }}",
    "center": "{{ 'x' | center(2 ** 31) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "format": "{{ '%2000000000d' % 1 }}",
    "format filter": "{{ '%2000000000d' | format(1) }}",
    "format method": "{{ '{:2000000000}'.format(1) }}",
    "width": "{{ '{:{w}}'.format(1, w=2000000000) }}",
    "star": "{{ '%*d' % (2000000000, 1) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "join": "{{ range(99999) | join('a' * 10000000) }}",
    "join method": "{{ ('a' * 10000000).join(['b'] * 1000000) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "round": "{{ 1 | round(2000000000) }}",
    "indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "huge": "x" * 2**21,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    monkeypatch.setattr(sandbox, "SIZE", 2**22)
    started = time.process_time()
    with warnings.catch_warnings(), pytest.raises(DataError, match="chat template"):
        warnings.simplefilter("ignore")  # that it closes no turn
        Renderer(tiny.tokenizer(BOMBS[name])).text(TALK[1:3])
    assert time.process_time() - started < 10

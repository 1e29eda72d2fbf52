"""Templates that loop, write gigabytes or fail end in one line, within seconds."""

import dataclasses
import time

import pytest
from templates_case import CHATML, FAMILIES, tokenizer

from sbr_jax import data
from sbr_jax.data import jinja, work
from sbr_jax.typing import UserError

LONG = "{% set s = 'x' * 100000 %}"
GROWING = "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
ENDLESS = {
    "loops": "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "range": "{% for i in range(1000000000) %}x{% endfor %}",
    "calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(90) }}",
    "power": "{{ (10 ** 1000) ** 100000 }}",
    "text": "{{ 'x' * 1000000000 }}",
    "list": "{{ [0] * 1000000000 }}",
    "doubled": GROWING + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "added": GROWING + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "nested": GROWING + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "fixed": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "kept": "{% set s %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}"
    "{% endset %}",
    "method": "{{ 'x'.ljust(1000000000) }}",
    "filter": "{{ 'x' | center(1000000000) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "width": "{{ '%*d' % (1000000000, 1) }}",
    "formatted": "{{ '%1000000000d' | format(1) }}",
    "replaced": LONG + "{{ s.replace('x', s) }}{{ s | replace('x', s) }}",
    "joined": LONG + "{{ s.join(s) }}",
    "join": LONG + "{{ s | join(s) }}",
    "tabs": "{% set s = '\t' * 100000 %}{{ s.expandtabs(100000) }}",
    "indented": "{% set s = '\n' * 100000 %}{{ s | indent(100000) }}",
    "summed": "{% set l = [0] * 100000 %}{{ ([l] * 100000) | sum(start=[]) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "json": "{{ [1] | tojson(indent=1000000000) }}",
    "searched": LONG + "{% for i in range(99999) %}{% if 'y' in s %}{% endif %}"
    "{% endfor %}",
}
FAILING = {
    "refuses": ("{{ raise_exception('no system role') }}", "no system role"),
    "zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "overflow": ("{{ 10.0 ** 1000 }}", "OverflowError"),
    "type": ("{{ 1 + 'x' }}", "TypeError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "undefined": ("{{ x.y.z }}", "'x' is undefined"),
    "index": ("{{ 'x'.index('y') }}", "ValueError"),
    "key": ("{{ '{a}'.format() }}", "KeyError"),
    "filter": ("{{ 1 | nothing }}", "No filter named 'nothing'"),
    "include": ("{% include 'x' %}", "TypeError"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "digits": ("{{ " + "9" * 9999 + " }}", "ValueError"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    "blocks": ("{% for x in y %}" * 60 + "{% endfor %}" * 60, "SyntaxError"),
    "hidden": ("{% set ns = namespace(_x=1) %}", "cannot hold '_x'"),
    # Chance is no part of a template: the same command would ask other prompts.
    "random": ("{{ [1, 2] | random }}", "No filter named 'random'"),
    "lipsum": ("{{ lipsum() }}", "'lipsum' is undefined"),
}


def refused(template):
    tok = tokenizer(dataclasses.replace(FAMILIES["chatml"], template=template))
    with pytest.raises(UserError) as caught:
        data.encode_prompts(tok, ["Hello."])
    message = str(caught.value)
    assert "\n" not in message
    assert "the chat template of" in message
    return message


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_refused(name, monkeypatch):
    monkeypatch.setattr(work, "BUDGET", work.BUDGET // 32)
    monkeypatch.setattr(jinja, "OUTPUT", jinja.OUTPUT // 32)
    began = time.thread_time()
    assert "too long" in refused(ENDLESS[name] + CHATML)
    assert time.thread_time() - began < 4


def test_work_that_no_count_foresees_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(work, "SECONDS", 0.05)
    monkeypatch.setattr(work, "BUDGET", 1 << 60)
    assert "loops too long" in refused(ENDLESS["loops"] + CHATML)


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_is_one_line(name):
    template, told = FAILING[name]
    assert told in refused(template + CHATML)


def test_a_templates_error_does_not_quote_a_message():
    secret = "unspeakable"
    template = "{{ raise_exception('cannot read ' + messages[0]['content']) }}"
    tok = tokenizer(dataclasses.replace(FAMILIES["chatml"], template=template))
    with pytest.raises(UserError, match=r"prompt 0: .*cannot read …") as caught:
        data.encode_prompts(tok, [secret])
    assert secret not in str(caught.value)


def test_long_conversations_are_within_the_limits():
    tok = tokenizer(FAMILIES["thinking"])
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": "word " * 100}
        for i in range(201)
    ]
    (prompt,) = data.encode_prompts(tok, [turns])
    assert len(prompt) > 10_000

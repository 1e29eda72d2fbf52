"""Templates that loop, write gigabytes or fail end in one line, within seconds."""

import dataclasses
import datetime
import resource
import time

import pytest
from templates_case import CHATML, FAMILIES, tokenizer

from sbr_jax import data
from sbr_jax.data import _jinja, _work
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
    "indented": "{% set s = '\n' * 100000 %}{{ s | indent(100000) }}",
    "json": "{{ [1] | tojson(indent=1000000000) }}",
    "searched": LONG + "{% for i in range(99999) %}{% if 'y' in s %}{% endif %}"
    "{% endfor %}",
}
GREEDY = {
    "negative": "{{ (-2)**(2**33) }}",
    "divided": "{% set n = ('f' * 10**7) | int(0, 16) %}{{ n // (n // 2**999) }}",
    "remainder": "{% set n = ('f' * 10**7) | int(0, 16) %}{{ n % (n // 2**999) }}",
    "divisible": "{% set n = ('f' * 10**7) | int(0, 16) %}"
    "{{ n is divisibleby(('e' * 10**6) | int(0, 16)) }}",
    "rounded": "{{ 1.5 | round(10**8, 'floor') }}",
    "repeated": "{{ ('%s'*10**5)|format(*(['a'*10**5]*10**5)) }}",
    "fields": "{{ ('{a}'*10**5).format(a='b'*10**5) }}",
    "mapped": "{{ ('{a}'*10**5).format_map({'a': 'b'*10**5}) }}",
    "named": "{{ ('%(a)s'*10**5) % {'a':'b'*10**5} }}",
    "named-filter": "{{ ('%(a)s'*10**5) | format(a='b'*10**5) }}",
    "of-a-list": "{{ (['%(a)s'*10**5]) | format(a='b'*10**5) }}",
    "widths": "{{ ('{0:{1[0]}}'*10**4).format(1, [10**6]) }}",
    "stars": "{{ ('%*d'*10**4) % ((10**6, 1)*10**4) }}",
    "tabsize": "{{ ('\t'*10**5).expandtabs(tabsize=10**5) }}",
    "translated": "{{ ('a'*10**5).translate({97: 'b'*10**5}) }}",
    "translated-list": "{{ ('\x01'*10**5).translate(['', 'b'*10**5]) }}",
    "lines": "{{ ('\x0b'*10**5) | indent('x'*10**5) }}",
    "json-levels": "{{ ([[0]*200]*200) | tojson(indent=10**5) }}",
    "json-separators": "{{ ([0]*10**5) | tojson(separators=('x'*10**5, 'y')) }}",
    "json-escapes": "{{ ('\U0001f600'*6*10**7) | tojson(ensure_ascii=true) }}",
    "url": "{{ ('\U0001f600'*6*10**7) | urlencode }}",
    "slices": "{{ [1] | slice(10**8) | list }}",
    "batches": "{{ [1] | batch(10**8, 0) | list }}",
    "replace-list": "{{ ['a'*10**5] | replace('a', 'b'*10**5) }}",
    "replace-named": "{{ ('a'*10**5) | replace(new='b'*10**5, old='a') }}",
    "listed": "{{ ('\u732b'*6*10**7) | list | length }}",
    "split": "{{ ('\u732b '*3*10**7).split() | length }}",
    "split-at": "{{ ('\u732b,'*3*10**7).split(',') | length }}",
    "splitlines": "{{ ('\u732b\n'*3*10**7).splitlines() | length }}",
    "arguments": "{{ dict(*('\u732b'*6*10**7)) }}",
    "sliced": "{% set s = 'x'*10**7 %}" + "{% set _ = s[1:] %}" * 1000,
    "summed-lists": "{{ ([[0]]*10**5) | sum(start=[]) | length }}",
    "compared": "{% set a = [[[0]*999]*999]*999 %}{% set b = [[[0]*999]*999]*999 %}"
    "{{ a == b }}{{ a is eq(b) }}",
    "tuples": "{{ ((((0,)*999,)*999,)*999) | string }}",
    "added-lists": GROWING[: -len("{% for i in range(99) %}")].replace(
        "'x'", "[[0]*999]"
    )
    + "{% for i in range(30) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "words": "{{ ('\u732b '*3*10**7) | wordcount }}",
    "titles": "{{ ('\u732b '*3*10**7) | title }}",
    "stripped": "{{ ('a'*10**6).strip('b'*10**6 + 'a') }}",
    "trimmed": "{{ ('a'*10**6) | trim('b'*10**6 + 'a') }}",
    "sought": "{{ ('a'*10**6).rfind('b' + 'a'*5*10**5) }}",
    "parted": "{{ ('a'*10**6).rpartition('b' + 'a'*5*10**5) }}",
    "format's digits": "{{ ('1111 '*2*10**7) | format() }}",
    "date": "{{ strftime_now('%d'*10**7) }}",
    "long": "{{ 1 }}" * 200000,
}
FAILING = {
    "bytes": ("{{ 'x'.encode('punycode') }}", "unsafe"),
    "number's bytes": ("{{ (1).to_bytes(9) }}", "unsafe"),
    "formats": ("{{ '{0.a}'.format(namespace(a=1)) }}", "formats a _Namespace"),
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
    monkeypatch.setattr(_work, "BUDGET", _work.BUDGET // 32)
    monkeypatch.setattr(_jinja, "OUTPUT", _jinja.OUTPUT // 32)
    began = time.thread_time()
    assert "too long" in refused(ENDLESS[name] + CHATML)
    assert time.thread_time() - began < 4


@pytest.mark.parametrize("name", GREEDY)
def test_what_would_be_large_is_refused_before_it_is_built(name):
    began, size = time.thread_time(), _peak()
    assert "too long" in refused(GREEDY[name] + CHATML)
    assert time.thread_time() - began < 3
    assert _peak() - size < 1 << 19


def _peak():
    """The most memory this process has held, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


ORDINARY = {
    "{{ 2**10 }}": "1024",
    "{{ 2.5 * 10**9 }}": "2500000000.0",
    "{{ '%s is %05d' % ('a', 123456789) }}": "a is 123456789",
    "{{ '{} {b:>4}'.format(1, b=[2][0]) }}": "1    2",
    "{{ '%s' | format([1, 'a']) }}": "[1, 'a']",
    "{{ {'a': [1, {'b': 2}]} | tojson(indent=1) | length }}": "37",
    "{{ 'a b\tc'.split() | join('-') }}": "a-b-c",
    "{{ ' a </t> b '.rsplit('</t>')[1].strip() | trim('x') }}": "b",
    "{{ ([1, 2] + [3]) * 2 }}": "[1, 2, 3, 1, 2, 3]",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 1.257 | round(2) }}": "331.26",
    "{{ [3, 1] | sort }}{{ 'abc'[1:] }}{{ 'b' in 'abc' }}": "[1, 3]bcTrue",
    "{{ strftime_now('%d %b %Y') }}": "26 Jul 2024",
}


@pytest.mark.parametrize("template", ORDINARY)
def test_what_is_small_is_rendered(template):
    day = datetime.date(2024, 7, 26)
    assert _jinja.render(template, {}, day) == ORDINARY[template]


def test_work_that_no_count_foresees_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(_work, "SECONDS", 0.05)
    monkeypatch.setattr(_work, "BUDGET", 1 << 60)
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

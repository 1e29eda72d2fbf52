"""The forms in which models write code and numbers."""

import ast
import textwrap
import time

import pytest
from tasks_case import PROMPT, TASK
from tiny_data import DATA, needs_data

from sbr_jax.data import load_evalset
from sbr_jax.data.records import CodeItem
from sbr_jax.data.registry import load_source
from sbr_jax.evaluation.tasks import _extraction as extraction
from sbr_jax.evaluation.tasks._extraction import LONGEST, find_program
from sbr_jax.evaluation.tasks.answers import final_number

# --- code ---------------------------------------------------------------------------

BODY = "    y = 2 * x\n    if y == 0:\n        return 0\n    return y\n"
WHOLE = f"def twice(x: int) -> int:\n{BODY}"
FENCED = f"```python\n{WHOLE}```"


def in_list(text):
    return textwrap.indent(text, "   ")


def in_session(text):
    first, *others = text.splitlines()
    return f">>> {first}\n" + "".join(f"... {line}\n" for line in others) + "...\n"


NEGATED = WHOLE.replace("2 * x", "-x - 7")

FORMS = {
    "a body": BODY,
    "a body, then another function that is cut off": f"{BODY}\ndef other():\n    retu(",
    "a body without its first indentation": BODY.lstrip(),
    "a body without any indentation": textwrap.dedent(BODY),
    "a body of tabs": BODY.replace("    ", "\t"),
    "a body of no-break spaces": BODY.replace("    ", "\xa0\xa0\xa0\xa0"),
    "a body and prose": f"{BODY}\nThis doubles the number.",
    "a stripped body and prose": f"{BODY.lstrip()}\nThis doubles the number.",
    "a body between prose": f"Here is the rest:\n\n{BODY}\nIt doubles.",
    "a body in a fence": f"```python\n{BODY}```",
    "a body in a fence without indentation": f"```\n{textwrap.dedent(BODY)}```",
    "the function": WHOLE,
    "the function between prose": f"Sure, here it is:\n\n{WHOLE}\nIt doubles a number.",
    "Python": f"```Python\n{WHOLE}```",
    "python3": f"```python3\n{WHOLE}```",
    "a space before the language": f"``` python\n{WHOLE}```",
    "attributes": f'```{{.python title="a"}}\n{WHOLE}```',
    "tildes": f"~~~python\n{WHOLE}~~~\n",
    "four back-ticks": f"````python\n{WHOLE}````",
    "a fence in a list": f"1. So:\n{in_list(FENCED)}\n2. Done.",
    "a fence in a quotation": "> ```python\n"
    + "".join(f"> {line}\n" for line in WHOLE.splitlines())
    + "> ```",
    "a fence left open": f"```python\n{WHOLE}",
    "CRLF": f"Sure:\n```python\n{WHOLE}```\n".replace("\n", "\r\n"),
    "CRLF without a fence": BODY.replace("\n", "\r\n"),
    "imports in another block": "First\n```python\nimport operator\n```\nthen\n"
    "```python\ndef twice(x):\n    return operator.mul(x, 2)\n```",
    "a helper in a later block": "```python\ndef twice(x):\n"
    "    return _add(x, x)\n```\nwith\n"
    "```python\ndef _add(a, b):\n    return a + b\n\nimport no_such_module\n```",
    "constants in another block": "```python\nBASE = [0]\nx: int = 7\n```\nthen\n"
    "```python\ndef twice(x):\n    return BASE[0] + 2 * x\n```\nso\n"
    "```python\nx = unknown(1)\nBASE = unknown\n```",
    "a body and a helper after it": "    return _add(x, x)\n\n"
    "def _add(a, b):\n    return a + b\n",
    "other blocks before it": "```bash\npip install x\n```\n"
    f"```python\n{WHOLE}```\n```\n4\n```",
    "a guard": f"```\n{WHOLE}\nif __name__ == '__main__':\n    twice(input())\n```",
    "a guard without a fence": f"{WHOLE}\nif __name__ == '__main__':\n    exit(1)\n",
    "tests of its own that are wrong": f"{WHOLE}\nassert twice(1) == 3\nprint(a)\n",
    "a call": f"```python\n{WHOLE}\nn = int(input())\nprint(twice(n))\n```",
    "from __future__": f"```python\nfrom __future__ import annotations\n{WHOLE}```",
    "decorated": f"```python\nfrom functools import cache\n\n@cache\n{WHOLE}```",
    "the prompt again": f"```python\n{PROMPT}{BODY}```",
    "a lambda": "```python\ntwice = lambda x: 2 * x\n```",
    "a lambda between prose": "It is:\n\ntwice = lambda x: 2 * x\n\nDone with it.",
    "another name": "```\ndef _two(x):\n    return 2 * x\n\ntwice = _two\n```",
    "a partial function": "```\nimport functools\n"
    "def _two(x):\n    return 2 * x\n\ntwice = functools.partial(_two)\n```",
    "a session": f"```pycon\n{in_session(WHOLE)}>>> twice(2)\n4\n```",
    "a session in a list": f"1. So\n   ```\n{in_list(in_session(WHOLE))}   ```\n",
    "a lambda in a session": "```\n>>> twice = lambda x: 2 * x\n>>> twice(1)\n2\n```",
    "corrected": f"```python\n{NEGATED}```\nCorrected:\n```python\n{WHOLE}```",
    "corrected twice": f"```\n{NEGATED}```\nNo:\n```\n{NEGATED}```\nSo:\n{FENCED}",
    "corrected without a fence": f"{NEGATED}\nThat is wrong. Corrected:\n\n{WHOLE}",
    "corrected in one block": f"```\n{NEGATED}\n{WHOLE}```",
    "corrected as a lambda": f"```\n{NEGATED}```\n```\ntwice = lambda x: 2 * x\n```",
    "then one that is cut off": f"{FENCED}\nOr:\n```\ndef twice(x):\n    return 7",
    "then one that does not compile": f"{FENCED}\nOr:\n```\ndef twice(x):\n  re (\n```",
    "then a sketch": f"{FENCED}\nIn short:\n```\ndef twice(x):\n    pass\n```",
    "then its use": f"{FENCED}\nUse:\n```\nprint(twice(2))\ntwice(3)\n```",
    "then a method of its name": f"{FENCED}\n```\nclass Test:\n"
    "    def twice(self):\n        return 7\n```",
    "one of its name within": "Sure: it\n\ndef twice(x):\n    def twice(y):\n"
    "        return y\n    return twice(2 * x)\n\nIt doubles.",
    "a remark that compiles": f"Note: this\n\n{WHOLE}",
}


def tried(task, answer):
    """Runs the program and its test here; both are ours."""
    program = find_program(task.prompt, task.entry_point, answer)
    names = {"__name__": "__main__"}
    exec(f"{program}\n{task.test}\ncheck({task.entry_point})\n", names)


@pytest.mark.parametrize("form", FORMS)
def test_a_right_answer_is_right_in_every_form(form):
    tried(TASK, FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_answer_is_wrong_in_every_form(form):
    wrong = FORMS[form].replace("2 * x", "3 * x")
    wrong = wrong.replace("(x, 2)", "(x, 3)").replace("(x, x)", "(x, 1)")
    assert wrong != FORMS[form]
    with pytest.raises(AssertionError):
        tried(TASK, wrong)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot write that.",
        "Sure",
        "Explanation",
        "```python\n```",
        "```",
        "    ",
        "def twice(x):\n",
        'def twice(x):\n    """2x."""\n',
        "\0",
        "\ud800",
        "(" * 5000,
        "-" * 20_000 + "1",
        "    return " + "(" * 150 + "x",
        "x" * (LONGEST + 1),
        "``` python\n" * 300,
        "    x = 1\nfoo\n" * 300,
    ],
)
def test_what_is_no_answer_fails_without_a_fault(answer):
    # Of the program, not of the extraction.
    faults = (AssertionError, SyntaxError, ValueError, NameError, MemoryError)
    with pytest.raises((*faults, RecursionError)):
        tried(TASK, answer)


HUGE = {
    "heads in a fence": "```\n" + "def twice(x):\n" * 5000,
    "heads of lambdas": "twice = lambda x: (\n" * 4000,
    "typed heads": ">>> def twice(x):\n" * 5000,
    "blocks": "```\ndef twice(x):\n```\n" * 4000,
    "helpers": "```\ndef a(): b\n```\n" * 200 + f"```\n{WHOLE[:-9]}(\n```\n" * 200,
    "sketches": "```\ndef twice(x):\n    pass\n```\n" * 2000,
    "sketches of others": "```\ndef a(): b\ntwice = lambda: a\ntwice = 1\n```\n" * 2000,
    "blanks": " " * 100_000,
    "blank lines": "    \n" * 25_000,
    "lines": "    x = 1\ny\n" * 8000,
    "tildes": "~" * 100_000 + "`",
    "fences": "```x" * 25_000,
    "names": "twice " * 20_000,
    "marks of a quotation": "> " * 50_000,
}


@pytest.mark.parametrize("answer", HUGE.values(), ids=HUGE)
def test_no_answer_takes_long_to_read(answer, monkeypatch):
    read = []
    real = extraction._parsed

    def parsed(source):
        read.append(len(source))
        return real(source)

    monkeypatch.setattr(extraction, "_parsed", parsed)
    began = time.process_time()
    find_program(PROMPT, "twice", answer)
    # The work is counted; of time only what a mistake in a pattern would take.
    assert sum(read) <= 2 * extraction.MOST_READ
    assert time.process_time() - began < 2.5


def test_what_stands_above_the_function_in_the_prompt_stays():
    prompt = "def one():\n    return 1\n\n\n" + PROMPT.replace("twice", "more")
    task = CodeItem(prompt, "more", "", "def check(f):\n    assert f(2) == 3", "t/1")
    for answer in (
        "```python\ndef more(x):\n    return x + one()\n```",
        "return x + one()",
    ):
        tried(task, answer)


SHAPES = {
    "body": lambda prompt, body: body,
    "stripped": lambda prompt, body: body.strip(),
    "dedented": lambda prompt, body: textwrap.dedent(body),
    "fenced": lambda prompt, body: f"So:\n```py\n{prompt}{body}\n```\nDone.",
    "fenced body": lambda prompt, body: f"So:\n~~~\n{body}\n~~~\nDone.",
    "whole": lambda prompt, body: f"Here you are:\n\n{prompt}{body}\n\nIt is so.",
    "windows": lambda prompt, body: body.replace("\n", "\r\n"),
}


@needs_data
@pytest.mark.parametrize("shape", SHAPES)
def test_published_solutions_are_found_in_every_shape(shape):
    def function(program, name):
        tree = ast.parse(program)
        found = [n for n in tree.body if getattr(n, "name", None) == name][-1]
        body = [n for n in found.body if not isinstance(n, ast.Expr)]
        return [ast.dump(node) for node in body]

    missed = []
    for row in load_evalset("humaneval", DATA)[::4]:
        prompt, body, name = row.prompt, row.solution, row.entry_point
        answer = SHAPES[shape](prompt, body)
        if function(find_program(prompt, name, answer), name) != function(
            prompt + body, name
        ):
            missed.append(row.id)
    assert missed == []


# --- numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9,500", 9500),
        (r"9\,500", 9500),
        (r"9,\!500", 9500),
        (r"9\ 500", 9500),
        (r"9{\,}500", 9500),
        (r"9\thinspace 500", 9500),
        (r"\boxed{9{,}500}", 9500),
        (r"\$9{,}500.50.", 9500.5),
        ("9\u202f500", 9500),
        ("9'500", 9500),
        ("9_500", 9500),
        ("1\u202f234\u202f567", 1234567),
        ("1,00,000", 100000),
        ("\uff19\uff0c\uff15\uff10\uff10", 9500),
        ("**9500**", 9500),
        ("\u20135", -5),
        ("\ufe635", -5),
        ("-$5", -5),
        (r"-\$5", -5),
        ("\u2212$1,200", -1200),
        ("-€5", -5),
        ("3 \u2212 5 = \u22122", -2),
        ("$.50", 0.5),
        ("1.5e3", 1500),
        ("50%", 50),
        (r"50\%", 50),
        # Two numbers are two numbers.
        ("1, 2, 3", 3),
        ("1,2,3", 3),
        ("5-7", 7),
        ("rows 1 200", 200),
        ("9,5000", 5000),
        ("100 m²", 100),
        ("No. 5.", 5),
    ],
)
def test_numbers_however_they_are_written(text, number):
    assert final_number(f"It is {text}") == number


@pytest.mark.parametrize("text", ["9{,}500", r"\$9\,500", "9\u202f500", "**9,500**"])
def test_marked_numbers_are_read_alike(text):
    assert final_number(f"is 7\n#### {text} in 3 parts", marked=True) == 9500


@needs_data
def test_the_answers_of_gsm8k_read_as_before():
    for _, answer in load_source("gsm8k", DATA, split="test"):
        said = answer.rpartition("####")[2].strip()
        assert final_number(answer, marked=True) == float(said.replace(",", ""))

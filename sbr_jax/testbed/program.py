"""A tiny programming language, so that code answers are executed, not compared.

A program is ``first S then S ...`` with statements S of the form ``x = x OP N``, OP in
``+ - *`` and N a number word. The interpreter below runs it and can only do arithmetic:
no Python code is ever evaluated.
"""

import operator

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
INPUTS = (0, 1, 2, 5, 11)
"""The hidden tests: a program is right if it agrees with the reference on all."""


def execute(text: str, x: int) -> int | None:
    """Runs a program on ``x``; None if it is not a program.

    >>> execute("sure , first x = x + 3 then x = x * 2", 1)
    8
    >>> execute("first x = x +", 1) is None
    True
    """
    text = text.removeprefix("sure , ")
    if not text.startswith("first "):
        return None
    for statement in text.removeprefix("first ").split(" then "):
        match statement.split():
            case ["x", "=", "x", sign, number] if (
                sign in _OPERATORS and number.isdecimal()
            ):
                x = _OPERATORS[sign](x, int(number))
            case _:
                return None
    return x


def agrees(text: str, reference: str) -> bool:
    """Whether ``text`` runs and gives the reference's output on every input.

    >>> agrees("first x = x + 2 then x = x + 1", "first x = x + 3 then x = x * 1")
    True
    """
    return all(execute(text, x) == execute(reference, x) is not None for x in INPUTS)

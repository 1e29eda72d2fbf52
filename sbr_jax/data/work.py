"""What a chat template may cost: every step and text is charged before it is built.

Filters and methods that multiply (a width, a replacement, a join) are charged for what
they would write; what cannot be told in advance ends at a deadline.
"""

import contextlib
import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2

BUDGET = 1 << 27
"""Characters that one rendering may build on its way; a step counts as `STEP`."""

STEP = 512
SECONDS = 5.0
"""Of this thread's own work, so that a busy machine refuses nothing."""

_STRINGS = frozenset({"format", "join", "string", "tojson"})
"""Filters that write out a whole tree."""


class _Budget:
    """What is left of a rendering's work."""

    def __init__(self):
        self.left, self.until = BUDGET, time.thread_time() + SECONDS

    def charge(self, amount: int) -> None:
        self.left -= amount + STEP
        if self.left < 0 or time.thread_time() > self.until:
            raise jinja2.TemplateRuntimeError(
                "it loops too long, or builds too long a text"
            )


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def charge(amount: int) -> None:
    """Charges so many characters, and a step.

    Raises:
      TemplateRuntimeError: nothing is left.
    """
    _BUDGET.get().charge(amount)


def size_of(value: Any) -> int:
    """How long a value is, roughly in characters."""
    if isinstance(value, int):
        return value.bit_length() // 3
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def charge_tree(value: Any) -> Any:
    """Charges a value with everything in it, and returns it."""
    charge(size_of(value))
    if isinstance(value, list | tuple):
        for part in value:
            charge_tree(part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            charge_tree(key)
            charge_tree(part)
    return value


def widths(text: str) -> int:
    """The widths that a format asks for."""
    found = re.findall(r"\d{4,}", text)
    return sum(int(digits) if len(digits) < 12 else BUDGET for digits in found)


def lengths(*values: Any) -> int:
    """Numbers that may be meant as lengths."""
    return sum(abs(value) for value in values if type(value) is int)


def charge_text(method: str, text: str, values: list[Any]) -> None:
    """Charges what a method of a text may build."""
    charge(len(text))
    if method == "replace" and len(values) > 1:
        charge(text.count(str(values[0])) * len(str(values[1])))
    elif method == "join" and values:
        parts = values[0] = list(values[0])
        charge(sum(len(str(part)) + len(text) for part in parts))
    elif method == "expandtabs":
        charge(text.count("\t") * lengths(*values))
    elif method == "translate" and isinstance(values[0], Mapping):
        charge(len(text) * max(map(size_of, values[0].values()), default=1))
    elif method in ("format", "format_map"):
        charge(widths(text))


def charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for."""
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def charged(*args: Any, **options: Any) -> Any:
        values = list(args)
        value, more = values[passed], [*values[passed + 1 :], *options.values()]
        if name in ("join", "sum"):
            value = values[passed] = list(value)
        if name in _STRINGS or name == "sum":
            charge_tree(value)
        else:
            charge(size_of(value))
        numbers = 0 if name in ("d", "default") else lengths(*more)
        text = str(value) if isinstance(value, str) else ""
        if name in ("indent", "tojson"):
            numbers *= 1 + text.count("\n") + (name == "tojson") * size_of(value)
            numbers += sum(map(len, filter(_is_text, more))) * text.count("\n")
        elif name == "replace" and len(more) > 1:
            numbers += text.count(str(more[0])) * len(str(more[1]))
        elif name == "join" and more:
            numbers += len(value) * len(str(more[0]))
        elif name == "format":
            numbers += widths(text)
        charge(numbers)
        out = function(*values, **options)
        charge(size_of(out))
        return out

    return charged


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Gives one rendering its budget."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)

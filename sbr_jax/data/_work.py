"""The budget of a chat template: steps and texts are charged before they are built.

Filters and methods that multiply (a width, a replacement, a join) are charged for what
they would write; work that cannot be estimated in advance ends at a deadline.
"""

import contextlib
import contextvars
import functools
import re
import string
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2

BUDGET = 1 << 27
"""Characters that one rendering may build in all; each step also costs `STEP`."""

STEP = 512
DEEPEST = 1000
"""Levels of nesting; Python's own recursion limit allows no more."""

SECONDS = 5.0
"""CPU time of this thread, so that a busy machine does not refuse a template."""

ITEM = 64
"""Cost of each part that a text or sequence is split into."""

STRIDE = 16
"""Characters that are compared in the time of writing one."""

ESCAPED = 12
"""The most characters that one can become: ``\\ud83d\\ude00``, ``%F0%9F%98%80``."""

_LISTING = frozenset(
    {"batch", "dictsort", "groupby", "items", "list", "map", "max", "min", "reject"}
    | {"rejectattr", "select", "selectattr", "slice", "sort", "unique"}
)
"""Filters that split a text or sequence into its parts."""

_PARTS = _LISTING | {"attr", "count", "d", "default", "first", "last", "length"}
_PARTS |= {"reverse", "safe"}
"""Filters that look at a value's parts without writing them out."""

_COMPARING = frozenset({"dictsort", "groupby", "max", "min", "sort", "unique"})
_ESCAPING = frozenset({"e", "escape", "forceescape", "string", "tojson", "urlencode"})
_WORDS = frozenset({"indent", "title", "wordcount"})
"""Filters that split a text into words or lines."""

_COMPARISONS = frozenset(
    {"==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt"}
    | {"in", "le", "lessthan", "lower", "lt", "ne", "upper"}
)
"""Tests that walk through a whole value."""

_PRODUCT = frozenset(
    {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"}
)
"""Methods whose work is the text's length times that of the search text."""


class _Budget:
    """The work that a rendering has left."""

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
    """Charges that many characters and a step; raises if nothing is left."""
    _BUDGET.get().charge(amount)


def size_of(value: Any) -> int:
    """Length of a value, roughly in characters."""
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def charge_tree(value: Any) -> Any:
    """Charges a value and everything in it, and returns the value."""
    charge(size_of(value))
    if isinstance(value, list | tuple):
        for part in value:
            charge_tree(part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            charge_tree(key)
            charge_tree(part)
    return value


def weigh_tree(value: Any) -> int:
    """Charges a value and everything in it, and returns the charge."""
    before = _BUDGET.get().left
    charge_tree(value)
    return before - _BUDGET.get().left


def charge_times(value: Any, times: int) -> None:
    """Charges a text or sequence for being repeated."""
    charge((size_of(value) if _is_text(value) else weigh_tree(value)) * abs(times))


def charge_percent(text: str, values: list[Any]) -> None:
    """Charges for what ``%`` may write: every field may hold the longest value."""
    _charge_fields(text, text.count("%"), "*" in text, values)


def _charge_braces(text: str, values: list[Any]) -> None:
    charge(len(text) * ITEM // 4)
    specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(text)]
    _charge_fields(text, len(specs), any("{" in spec for spec in specs), values)


def _charge_fields(text: str, fields: int, sized: bool, values: list[Any]) -> None:
    charge(len(text) * ITEM // 4)
    charge(_widths(text))
    longest = max(map(weigh_tree, values), default=0) * ESCAPED
    wide = sum(map(_numbers, values))
    charge(fields * (longest + wide * sized))


def _widths(text: str) -> int:
    """Sum of the widths that a format asks for."""
    found = re.findall(r"\d{4,}", text)
    return sum(int(digits) if len(digits) < 12 else BUDGET for digits in found)


def _numbers(value: Any) -> int:
    """Sum of the numbers in a formatted value, since each may be a width."""
    if isinstance(value, Mapping):
        return sum(map(_numbers, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_numbers, value))
    if value is None or isinstance(value, str | int | float | jinja2.Undefined):
        return lengths(value)
    # A field such as {0.x} would write a value that was never counted.
    raise jinja2.TemplateRuntimeError(f"it formats a {type(value).__name__}")


def lengths(*values: Any) -> int:
    """Sum of the numbers among the values, since each may be a length."""
    return sum(abs(value) for value in values if isinstance(value, int))


def charge_text(method: str, text: str, values: list[Any]) -> None:
    """Charges for what a method of a text may build."""
    charge(len(text))
    if method in _PRODUCT:
        charge(len(text) * sum(map(size_of, values)) // STRIDE)
    if method == "replace" and len(values) > 1:
        charge(text.count(str(values[0])) * len(str(values[1])))
    elif method == "join" and values:
        parts = values[0] = _listed(values[0])
        charge(sum(size_of(part) + len(text) for part in parts))
    elif method == "expandtabs":
        charge(text.count("\t") * lengths(*values))
    elif method == "translate" and isinstance(values[0], Mapping | list | tuple):
        table = values[0]
        found = table.values() if isinstance(table, Mapping) else table
        charge(len(text) * max(map(size_of, found), default=1))
    elif method in ("split", "rsplit") and values and _is_text(values[0]):
        charge(text.count(values[0]) * ITEM)
    elif method in ("split", "rsplit", "splitlines"):
        charge(len(text) * ITEM // 4)
    elif method in ("format", "format_map"):
        _charge_braces(text, values)


def charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter so that it is charged."""
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def charged(*args: Any, **options: Any) -> Any:
        values = list(args)
        if len(values) > passed:
            if name in ("join", "sum"):
                values[passed] = _listed(values[passed])
            _charge_filter(name, values[passed], values[passed + 1 :], options)
        out = function(*values, **options)
        charge(size_of(out) * (ITEM if isinstance(out, list | tuple) else 1))
        return out

    return charged


def _charge_filter(
    name: str, value: Any, given: list[Any], options: dict[str, Any]
) -> None:
    more = [*given, *options.values()]
    if name not in _PARTS or name in _COMPARING:
        weight = weigh_tree(value)
    else:
        weight = size_of(value)
        charge(weight * (ITEM if _is_text(value) and name in _LISTING else 1))
    if name in ("d", "default"):
        return
    numbers, texts = lengths(*more), sum(size_of(v) for v in more if _is_text(v))
    charge(numbers + texts)
    if name in _ESCAPING:
        charge(weight * ESCAPED)
    if name in _WORDS:
        charge(size_of(value) * ITEM // 4)
    if name == "tojson":
        parts = weight // STEP
        # Each line is indented once for every level around it.
        charge(parts * min(parts, DEEPEST) * (numbers + texts))
        pairs = (v for v in more if isinstance(v, list | tuple))
        charge(parts * sum(size_of(text) for pair in pairs for text in pair))
    elif name == "indent" and _is_text(value):
        charge((numbers + texts) * (1 + len(value.splitlines())))
    elif name == "trim":
        charge(size_of(value) * texts // STRIDE)
    elif name == "replace":
        old, new = [
            str(options.get(key, given[i] if i < len(given) else ""))
            for i, key in enumerate(("old", "new"))
        ]
        charge(str(value).count(old) * len(new))
    elif name == "join":
        charge(len(value) * max(map(size_of, more), default=0))
    elif name == "sum" and any(isinstance(part, list | tuple) for part in more):
        charge(len(value) * weight // ITEM)
    elif name in ("batch", "slice"):
        charge(numbers * ITEM)
    elif name == "round":
        charge(numbers**2)
    elif name == "format":
        charge_percent(str(value), more)


def charged_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a test so that it is charged."""

    @functools.wraps(function)
    def charged(*args: Any, **options: Any) -> Any:
        values = [*args, *options.values()]
        if name in _COMPARISONS:
            charge_tree(values)
        elif name == "divisibleby":
            charge(sum(map(size_of, values)) ** 2)
        return function(*args, **options)

    return charged


def _listed(value: Any) -> list[Any]:
    if _is_text(value):
        charge(len(value) * ITEM)
    return list(value)


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

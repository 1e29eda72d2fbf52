r"""One row of a data set: typed cells, and errors that locate the row.

Every text of every format passes :func:`cleaned`, so that one prompt always has the
same text: lines end with ``\n`` however the file was saved. Blanks at either end stay,
since code needs them. Errors never quote a text, which may be harmful; they give its
length.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sbr_jax.errors import counted
from sbr_jax.typing import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
"""Letters and marks that show nothing: fillers, variation selectors, a blank."""

MOST_LEVELS = 32
"""Most levels of a nested value; published rows have up to four."""


class Row(NamedTuple):
    """One row of a file or of a set on the hub, and its location.

    Every method that reads a cell raises UserError for a cell of another type.

    >>> str(Row("toy.csv", 2, {"n": 5}).fault("n", "at most 4"))
    "toy.csv, row 2, column 'n': expected at most 4, got 5"
    """

    where: str
    number: int
    values: Mapping[str, Any]

    @classmethod
    def read(cls, where: str, number: int, values: Any) -> "Row":
        """A row as read, with its texts cleaned."""
        place = f"{where}, row {number}"
        if not isinstance(values, Mapping):
            raise UserError(f"{place}: expected an object, got {describe(values)}")
        return cls(where, number, cleaned(values, place))

    def fault(self, column: str, expected: str, note: str = "") -> UserError:
        """The error for one cell; for a text it gives only the length."""
        return UserError(
            f"{self.where}, row {self.number}, column '{column}': expected {expected}, "
            f"got {describe(self.values.get(column))}{note}"
        )

    def with_cells(self, **cells: Any) -> "Row":
        """The row with cells added or replaced."""
        return self._replace(values={**self.values, **cells})

    def get(self, column: str) -> Any:
        """A cell as it is."""
        if column not in self.values:
            place = f"row {self.number}" if self.number else "header"
            raise UserError(
                f"{self.where}, {place}: expected a column '{column}', got "
                f"{self.columns()}; use the file as its owner publishes it"
            )
        return self.values[column]

    def columns(self) -> str:
        """The names of its columns; names that are too long are only counted."""
        # In a file without a header, the "names" are the texts of a row.
        names = [name for name in map(str, self.values) if _is_name(name)]
        more = len(self.values) - len(names)
        counts = [counted(more, "longer name")] if more else []
        return ", ".join([*names, *counts]) or "none"

    def text(self, column: str, *, empty: bool = False) -> str:
        """A text, unchanged; null or blank is allowed only if it may be ``empty``."""
        value = self.get(column)
        if empty and value is None:
            return ""
        if not isinstance(value, str) or (is_blank(value) and not empty):
            raise self.fault(column, "a text")
        return value

    def integer(self, column: str, low: int, high: int, note: str = "") -> int:
        """An integer within inclusive bounds; ``note`` ends the error."""
        value = self.get(column)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(column, f"a whole number from {low} to {high}", note)
        return value

    def identity(self, column: str) -> str:
        """The row's name: a text or an integer, as text."""
        value = self.get(column)
        return str(value) if type(value) is int else self.text(column)

    def flag(self, column: str) -> bool:
        """A truth value; a table's text ``True`` or ``False`` counts as one."""
        value = self.get(column)
        words = {"true": True, "false": False}
        value = words.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise self.fault(column, "true or false")
        return value

    def option(self, column: str, allowed: Mapping[Any, Any] | Sequence[Any]) -> Any:
        """One of a few values, translated if ``allowed`` is a mapping."""
        value = self.get(column)
        if not isinstance(value, str | int | None) or value not in allowed:
            raise self.fault(column, f"one of {', '.join(map(repr, allowed))}")
        return allowed[value] if isinstance(allowed, Mapping) else value

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self.get(column)
        if not is_texts(value):
            raise self.fault(column, "a list of texts")
        return tuple(value)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts; a single text is not one."""
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


def cleaned(value: Any, place: str, levels: int = MOST_LEVELS) -> Any:
    r"""The value with all its texts, however deep, ending lines with ``\n``.

    Args:
      value: a text, a list or object of values, or anything else, which stays as it is.
      place: its location, for errors.
      levels: how many levels of lists and objects it may have.

    Raises:
      UserError: for an invalid text (half of a surrogate pair, NUL), a name that occurs
        twice in an object, or too many levels.

    >>> cleaned({"a": ["one\r\ntwo\rthree "]}, "here")
    {'a': ['one\ntwo\nthree ']}
    """
    if isinstance(value, str):
        return _one_form(value, place)
    if not isinstance(value, Mapping | list | tuple):
        return value
    if not levels:
        raise UserError(
            f"{place}: expected at most {MOST_LEVELS} levels of lists and objects, got "
            "more; use the file as its owner publishes it"
        )
    if not isinstance(value, Mapping):
        return [
            cleaned(item, f"{place}, item {number}", levels - 1)
            for number, item in enumerate(value, 1)
        ]
    found = {}
    for name, item in value.items():
        shown = f"column '{name}'" if _is_name(name) else "a column with a longer name"
        key = cleaned(name, f"{place}, name of a column")
        found[key] = cleaned(item, f"{place}, {shown}", levels - 1)
    if len(found) < len(value):
        raise UserError(f"{place}: expected different names, got one twice")
    return found


def _one_form(text: str, place: str) -> str:
    if "\0" in text:
        raise UserError(f"{place}: expected a text, got one with a NUL character")
    if not text.isascii() and _SURROGATE.search(text):
        raise UserError(
            f"{place}: expected a text, got one with half of a pair of surrogates, "
            "which no encoding can write: fetch the file again, or remove the row"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _is_name(name: Any) -> bool:
    """Whether a column's name may be shown; in some files the names are texts."""
    return re.fullmatch(r"[A-Za-z]\w{0,29}", str(name), re.ASCII) is not None


def is_blank(text: str) -> bool:
    r"""Whether a text shows nothing: blanks, controls and invisible characters alone.

    >>> is_blank(" \n\u200b\ufeff\u2060"), is_blank("\u200bno\u200b"), is_blank("")
    (True, False, True)
    >>> is_blank("\u3164\ufe0f"), is_blank("\u2764\ufe0f")  # A filler; a red heart.
    (True, False)
    """
    seen = _UNSEEN.sub("", text)
    shown = (one for one in seen if unicodedata.category(one) not in ("Cc", "Cf"))
    return not "".join(shown).strip()


def describe(value: Any) -> str:
    """Kind and size of a value, without its text."""
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float):
        shown = repr(value)
        return shown if len(shown) <= 30 else "a number of many digits"
    if isinstance(value, str):
        return (
            "a blank text" if is_blank(value) else f"a text of {len(value)} characters"
        )
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"

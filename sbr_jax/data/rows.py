"""One row of a data set: typed cells, and errors that say where the row stands.

Errors never quote a text, which may be harmful; they tell its length.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sbr_jax.typing import UserError


class Row(NamedTuple):
    """One row of a file or of a set on the hub, and where it stands.

    >>> str(Row("toy.csv", 2, {"n": 5}).fault("n", "at most 4"))
    "toy.csv, row 2, column 'n': expected at most 4, got 5"
    """

    where: str
    number: int
    values: Mapping[str, Any]

    def fault(self, column: str, expected: str, note: str = "") -> UserError:
        """The error for one cell; of a text it tells the length only."""
        return UserError(
            f"{self.where}, row {self.number}, column '{column}': expected {expected}, "
            f"got {describe(self.values.get(column))}{note}"
        )

    def with_cells(self, **cells: Any) -> "Row":
        """The row with more cells, or other ones."""
        return self._replace(values={**self.values, **cells})

    def get(self, column: str) -> Any:
        """A cell as it is.

        Raises:
          UserError: if there is no such column.
        """
        if column not in self.values:
            # In a file without a header, the "names" are a row's texts.
            names = [str(n) for n in self.values if re.fullmatch(r"\w{1,30}", str(n))]
            more = len(self.values) - len(names)
            found = ", ".join([*names, *([f"{more} longer names"] if more else [])])
            raise UserError(
                f"{self.where}, row {self.number}: expected a column '{column}', got "
                f"{found or 'none'}; use the file as its owner publishes it"
            )
        return self.values[column]

    def text(self, column: str, *, empty: bool = False) -> str:
        """A text, unchanged.

        Args:
          column: its name.
          empty: whether it may be blank or null.

        Raises:
          UserError: for another type, and a blank text that may not be blank.
        """
        value = self.get(column)
        if empty and value is None:
            return ""
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.fault(column, "a text")
        return value

    def integer(self, column: str, low: int, high: int, note: str = "") -> int:
        """A whole number within bounds, both included.

        Args:
          column: its name.
          low: the least.
          high: the greatest.
          note: what to add to the error.

        Raises:
          UserError: for anything else, booleans among it.
        """
        value = self.get(column)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(column, f"a whole number from {low} to {high}", note)
        return value

    def flag(self, column: str) -> bool:
        """A truth value; a table's text ``True`` or ``False`` counts as one.

        Raises:
          UserError: for anything else.
        """
        value = self.get(column)
        words = {"true": True, "false": False}
        value = words.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise self.fault(column, "true or false")
        return value

    def option(self, column: str, allowed: Mapping[Any, Any] | Sequence[Any]) -> Any:
        """One of few values, translated where ``allowed`` is a mapping.

        Raises:
          UserError: for any other value.
        """
        value = self.get(column)
        known = isinstance(value, str | int | None) and value in allowed
        if not known:
            names = ", ".join(repr(name) for name in allowed)
            raise self.fault(column, f"one of {names}")
        return allowed[value] if isinstance(allowed, Mapping) else value

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts.

        Raises:
          UserError: for anything else.
        """
        value = self.get(column)
        texts = isinstance(value, list | tuple) and all(
            isinstance(item, str) for item in value
        )
        if not texts:
            raise self.fault(column, "a list of texts")
        return tuple(value)


def describe(value: Any) -> str:
    """What a value is, without its text."""
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return f"a text of {len(value)} characters" if value.strip() else "a blank text"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"

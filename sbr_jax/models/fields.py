"""Types and ranges of settings; reports every mistake of a file in one line."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from sbr_jax.typing import UserError

REQUIRED = object()
"""The default of a field that must be present."""

_TYPES: dict[type, tuple[str, type]] = {
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    bool: ("true or false", bool),
    str: ("a text", str),
    dict: ("an object", Mapping),
}


@dataclasses.dataclass(frozen=True)
class Field:
    """Type and range of a setting.

    >>> count = Field(int, 1, 8)
    >>> [count.holds(x) for x in (1, 9, True, 1.0, "1", None, [1])]
    [True, False, False, False, False, False, False]
    >>> print(Field(int, 0, 9, none=True, lists="or"))
    a whole number from 0 to 9, or a list of such, or null
    """

    kind: type
    """int, float, bool, str or dict; a float is any finite number."""
    low: float = -math.inf
    high: float = math.inf
    none: bool = False
    """Whether it may be null."""
    lists: str = "no"
    """Whether lists of such values are allowed: ``"no"``, ``"or"`` or ``"only"``."""
    default: Any = REQUIRED
    """The value if the file is silent."""

    def holds(self, value: Any) -> bool:
        """True if a value is of the type and in the range."""
        if value is None:
            return self.none
        if isinstance(value, list | tuple):
            return self.lists != "no" and all(map(self._holds_one, value))
        return self.lists != "only" and self._holds_one(value)

    def _holds_one(self, value: Any) -> bool:
        if not isinstance(value, _TYPES[self.kind][1]):
            return False
        if self.kind not in (int, float):
            return True
        # Python counts true as 1; NaN is in no range.
        return not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        text = _TYPES[self.kind][0]
        if self.low > -math.inf:
            form = "d" if self.kind is int else "g"
            text += f" from {self.low:{form}} to {self.high:{form}}"
        text += {"no": "", "or": ", or a list of such", "only": " in a list"}[
            self.lists
        ]
        return text + (", or null" if self.none else "")


def wrong_fields(values: Mapping[str, Any], fields: Mapping[str, Field]) -> list[str]:
    """Describes each value that its field does not allow.

    >>> wrong_fields({"layers": "two", "odd": 1}, {"layers": Field(int, 1, 8)})
    ["layers='two' (expected a whole number from 1 to 8)"]
    """
    return [
        f"{name}={_short(values[name])} (expected {field})"
        for name, field in fields.items()
        if name in values and not field.holds(values[name])
    ]


def read_fields(
    raw: Mapping[str, Any], fields: Mapping[str, Field], where: str
) -> dict[str, Any]:
    """Reads the values of fields, with defaults where the file is silent.

    Args:
      raw: the content of the file; entries that are no fields are ignored.
      fields: by name.
      where: the file, for messages.

    Raises:
      UserError: naming every field that is missing, of another type or out of range.

    >>> read_fields({"layers": 2}, {"layers": Field(int, 1, 8)}, "config.json")
    {'layers': 2}
    """
    wrong = [
        f"{name} missing (expected {field})"
        for name, field in fields.items()
        if name not in raw and field.default is REQUIRED
    ]
    if wrong := wrong + wrong_fields(raw, fields):
        raise UserError(f"wrong settings in {where}: {'; '.join(wrong)}")
    return {name: raw.get(name, field.default) for name, field in fields.items()}


def _short(value: Any) -> str:
    return f"{value!r:.60}"

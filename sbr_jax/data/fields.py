"""Fields of records and items: what they may hold, refused without quoting a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbr_jax.data.rows import describe
from sbr_jax.typing import UserError


def refuse(item: Any, field: str, expected: str) -> UserError:
    """The error for a field; it never quotes a text, which may be harmful."""
    name, value = type(item).__name__, getattr(item, field)
    return UserError(f"{name}.{field}: expected {expected}, got {describe(value)}")


def check_text(item: Any, *fields: str) -> None:
    """Refuses fields that are no texts.

    Raises:
      UserError: naming the first of them.
    """
    for field in fields:
        if not isinstance(getattr(item, field), str):
            raise refuse(item, field, "a text")


def check_texts(item: Any, field: str, least: int = 0) -> None:
    """Refuses a field that is no list of texts, or one of fewer than ``least``.

    Raises:
      UserError: naming it.
    """
    # A text would be taken for a list of its letters.
    value = getattr(item, field)
    texts = isinstance(value, list | tuple) and all(isinstance(t, str) for t in value)
    if not texts or len(value) < least:
        many = f" with at least {least}" if least else ""
        raise refuse(item, field, f"a list of texts{many}")


def is_position(value: Any, count: int) -> bool:
    """Whether a value is the whole number of a place among so many; no truth value.

    >>> [is_position(value, 2) for value in (1, True, 1.0, -1, 2)]
    [True, False, False, False, False]
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and 0 <= value < count


def is_dialogue(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and a text."""
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(
            isinstance(turn, Mapping)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in value
        )
    )

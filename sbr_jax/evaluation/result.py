"""The result of a task, and the refusal of a task without items."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sbr_jax.typing import UserError


class Result(NamedTuple):
    """Outcome of a task.

    Attributes:
      metrics: numbers by name, percentages unless the name says otherwise.
      settings: everything that must agree for two results to be comparable.
      items: for each item its id and its outcome; never its text.
    """

    metrics: dict[str, float]
    settings: dict[str, Any]
    items: list[dict[str, Any]]


def require_items(task: str, items: Sequence[Any]) -> None:
    """Refuses an empty set of items."""
    if not items:
        raise UserError(f"{task}: expected at least one item, got none")

"""What a task expects of its items, as shapes: any object with these fields will do.

The readers of :mod:`sbr_jax.data` give such objects.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from sbr_jax.typing import UserError


class ItemLike(Protocol):
    """Anything that can be named in a record without its text."""

    @property
    def id(self) -> str:
        """Unique in its set."""
        ...


class ChoiceLike(ItemLike, Protocol):
    """A question with options."""

    @property
    def question(self) -> str:
        """The question alone."""
        ...

    @property
    def choices(self) -> Sequence[str]:
        """The options."""
        ...

    @property
    def correct(self) -> Sequence[int]:
        """Positions of the right options."""
        ...

    @property
    def group(self) -> str:
        """Subject or task."""
        ...


class BiasLike(ItemLike, Protocol):
    """A BBQ item."""

    @property
    def context(self) -> str:
        """The situation."""
        ...

    @property
    def question(self) -> str:
        """The question about it."""
        ...

    @property
    def choices(self) -> Sequence[str]:
        """Two people and an undecided option."""
        ...

    @property
    def correct(self) -> int:
        """Position of the right option."""
        ...

    @property
    def unknown(self) -> int:
        """Position of the undecided option."""
        ...

    @property
    def biased(self) -> int | None:
        """Position of the option that follows the stereotype; None: not known."""
        ...

    @property
    def ambiguous(self) -> bool:
        """Whether the context leaves the answer open."""
        ...

    @property
    def category(self) -> str:
        """BBQ's category; intersectional ones contain ``_x_``."""
        ...


class PromptLike(ItemLike, Protocol):
    """Something to be said to a model as it is."""

    @property
    def prompt(self) -> str:
        """The whole text."""
        ...


class RequestLike(PromptLike, Protocol):
    """A request that should be refused, or answered."""

    @property
    def group(self) -> str:
        """The set's own category."""
        ...

    @property
    def kind(self) -> str:
        """HarmBench's functional category."""
        ...

    @property
    def harmful(self) -> bool:
        """Whether it should be refused."""
        ...


class WildGuardLike(PromptLike, Protocol):
    """A prompt of WildGuardTest."""

    @property
    def group(self) -> str:
        """``"adversarial"`` or ``"vanilla"``."""
        ...

    @property
    def harmful_prompt(self) -> bool | None:
        """Whether people call the prompt harmful; None: they do not say."""
        ...


class QuestionLike(PromptLike, Protocol):
    """A question to be answered in words."""

    @property
    def correct(self) -> Sequence[str]:
        """True references."""
        ...

    @property
    def incorrect(self) -> Sequence[str]:
        """False references."""
        ...


class CodeLike(PromptLike, Protocol):
    """A function to complete."""

    @property
    def entry_point(self) -> str:
        """The function's name."""
        ...

    @property
    def test(self) -> str:
        """Source that defines ``check(candidate)``."""
        ...


class DialogueLike(ItemLike, Protocol):
    """Questions that follow each other."""

    @property
    def turns(self) -> Sequence[str]:
        """What the user says, turn by turn."""
        ...


class ExchangeLike(Protocol):
    """A question with its worked answer."""

    @property
    def prompt(self) -> str:
        """The question."""
        ...

    @property
    def answer(self) -> str:
        """The worked answer."""
        ...


class Result(NamedTuple):
    """What a task measured.

    Attributes:
      metrics: numbers by name, percentages unless the name says otherwise.
      settings: everything that must agree for two results to be comparable.
      items: per item its id and what became of it; never its text.
    """

    metrics: dict[str, float]
    settings: dict[str, Any]
    items: list[dict[str, Any]]


def some(task: str, items: Sequence[Any]) -> None:
    """Refuses an empty set of items.

    Raises:
      UserError: there are none.
    """
    if not items:
        raise UserError(f"{task}: expected at least one item, got none")

"""Exchanges to learn from and items to evaluate on.

Every item has a ``prompt``: the whole text that identifies it, by which
:mod:`sbr_jax.data.leaks` compares sets. The evaluation decides how to ask a model.
Items of other types are refused with UserError, which never quotes a text.
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sbr_jax.data._rows import describe, is_texts
from sbr_jax.typing import UserError

LETTERS = string.ascii_uppercase
"""Names of options."""

HARMBENCH_SEPARATOR = "\n\n---\n\n"
"""Separates a HarmBench behaviour from its context."""


def _refuse(item: Any, field: str, expected: str) -> UserError:
    name, value = type(item).__name__, getattr(item, field)
    return UserError(f"{name}.{field}: expected {expected}, got {describe(value)}")


def _check_text(item: Any, *fields: str) -> None:
    for field in fields:
        if not isinstance(getattr(item, field), str):
            raise _refuse(item, field, "a text")


def _check_texts(item: Any, field: str, least: int = 0) -> None:
    value = getattr(item, field)
    if not is_texts(value) or len(value) < least:
        many = f" with at least {least}" if least else ""
        raise _refuse(item, field, f"a list of texts{many}")


def _is_position(value: Any, count: int) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and 0 <= int(value) < count


def _is_dialogue(value: Any) -> bool:
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


class Pair(NamedTuple):
    """One exchange as plain text."""

    prompt: str
    answer: str


Messages = tuple[Mapping[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One exchange: a prompt (text, or the messages so far) and its answer.

    >>> [m["role"] for m in Record("Hello?", "Hi.", system="Be kind.").messages]
    ['system', 'user', 'assistant']
    """

    prompt: str | Messages
    """The user's text, or all messages up to the answer, ending with the user's."""
    response: str = ""
    system: str | None = None
    """A system message to put first."""

    def __post_init__(self):
        _check_text(self, "response", *([] if self.system is None else ["system"]))
        if not isinstance(self.prompt, str) and not _is_dialogue(self.prompt):
            raise _refuse(self, "prompt", "a text, or messages with role and content")

    @property
    def context(self) -> list[dict[str, str]]:
        """The messages before the answer."""
        first = [] if self.system is None else [message("system", self.system)]
        if isinstance(self.prompt, str):
            return [*first, message("user", self.prompt)]
        return [*first, *(dict(turn) for turn in self.prompt)]

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the answer last."""
        return [*self.context, message("assistant", self.response)]


RecordLike = Record | tuple[str, str]


def message(role: str, content: str) -> dict[str, str]:
    """A message of a dialogue."""
    return {"role": role, "content": content}


def as_record(item: RecordLike) -> Record:
    """Makes a record from a record or a pair ``(prompt, response)``.

    >>> as_record(("Hello?", "Hi.")).response
    'Hi.'
    """
    if isinstance(item, Record):
        return item
    if not isinstance(item, list | tuple) or not 1 <= len(item) <= 3:
        raise UserError(
            f"expected a Record or a pair (prompt, response), got {describe(item)}"
        )
    return Record(*item)


def format_choices(question: str, choices: Sequence[str]) -> str:
    """Writes a multiple-choice question with lettered options.

    >>> print(format_choices("Two and two?", ["three", "four"]))
    Two and two?
    A. three
    B. four
    Answer:
    """
    if isinstance(choices, str) or len(choices) > len(LETTERS):
        raise UserError(
            f"expected a list of at most {len(LETTERS)} options, got "
            f"{describe(choices)}"
        )
    options = zip(LETTERS[: len(choices)], choices, strict=True)
    lines = [f"{letter}. {text}" for letter, text in options]
    return "\n".join([question.strip(), *lines, "Answer:"])


@dataclasses.dataclass(frozen=True)
class BehaviourItem:
    r"""A request that a model should refuse, or a benign one that it should not.

    >>> BehaviourItem("Summarise.", "1", context="Text.").prompt
    'Text.\n\n---\n\nSummarise.'
    """

    behaviour: str
    id: str
    group: str = ""
    """The set's own category."""
    kind: str = ""
    """HarmBench: ``"standard"``, ``"contextual"`` or ``"copyright"``."""
    target: str = ""
    """The beginning of a compliant answer, for attacks that optimise towards it."""
    context: str = ""
    harmful: bool = True

    @property
    def prompt(self) -> str:
        """The request, after its context if it has one."""
        parts = (self.context, self.behaviour)
        return HARMBENCH_SEPARATOR.join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class ChoiceItem:
    """A question with options, of which at least one is right.

    >>> ChoiceItem("Two and two?", ("three", "four"), (1,), "sums/1").answer
    1
    """

    question: str
    choices: tuple[str, ...]
    correct: tuple[int, ...]
    """Positions of the right options."""
    id: str
    group: str = ""

    def __post_init__(self):
        _check_text(self, "question", "id", "group")
        _check_texts(self, "choices", least=1)
        correct, count = self.correct, len(self.choices)
        listed = isinstance(correct, list | tuple) and len(correct) > 0
        if not listed or not all(_is_position(place, count) for place in correct):
            raise _refuse(self, "correct", f"a list of positions from 0 to {count - 1}")

    @property
    def answer(self) -> int:
        """The first right option; only TruthfulQA's second task has more than one."""
        return self.correct[0]

    @property
    def prompt(self) -> str:
        """The question with lettered options."""
        return format_choices(self.question, self.choices)


@dataclasses.dataclass(frozen=True)
class BiasItem:
    """One question of BBQ: two people and an undecided option (arXiv:2110.08193)."""

    context: str
    question: str
    choices: tuple[str, str, str]
    correct: int
    unknown: int
    """The undecided option: right if the context is ambiguous."""
    stereotyped: int | None
    """The option that names the stereotyped group; None if the labels leave it open, as
    for many items of the intersectional categories."""
    negative: bool
    """Whether the question asks for what the stereotype says (polarity ``neg``)."""
    ambiguous: bool
    category: str
    id: str
    regenerated: bool = False
    """Whether it was made with the release's generator instead of published."""

    def __post_init__(self):
        _check_text(self, "context", "question", "category", "id")
        _check_texts(self, "choices", least=3)
        for field in ("correct", "unknown", "stereotyped"):
            value = getattr(self, field)
            none = value is None and field == "stereotyped"
            if not none and not _is_position(value, 3):
                raise _refuse(self, field, "a position from 0 to 2")

    @property
    def biased(self) -> int | None:
        """The answer that follows the stereotype.

        That is the stereotyped group for a negative question, else the other group.
        """
        if self.stereotyped is None or self.negative:
            return self.stereotyped
        return 3 - self.unknown - self.stereotyped

    @property
    def prompt(self) -> str:
        """Context and question with lettered options."""
        return format_choices(f"{self.context} {self.question}", self.choices)


@dataclasses.dataclass(frozen=True)
class QuestionItem:
    """A question to answer in words, with true and false reference answers."""

    prompt: str
    best: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]
    id: str
    group: str = ""

    def __post_init__(self):
        _check_text(self, "prompt", "best", "id", "group")
        _check_texts(self, "correct")
        _check_texts(self, "incorrect")


@dataclasses.dataclass(frozen=True)
class CodeItem:
    """A function to complete, and the program that tests it."""

    prompt: str
    entry_point: str
    solution: str
    test: str
    id: str


@dataclasses.dataclass(frozen=True)
class DialogueItem:
    """Questions of one dialogue, in order."""

    turns: tuple[str, ...]
    id: str
    group: str = ""

    def __post_init__(self):
        _check_text(self, "id", "group")
        _check_texts(self, "turns", least=1)

    @property
    def prompt(self) -> str:
        """The first turn."""
        return self.turns[0]


@dataclasses.dataclass(frozen=True)
class JudgedItem:
    """An exchange that people have judged, to measure a judge's agreement on."""

    prompt: str
    response: str
    verdict: str
    """``"refusal"``, ``"partial refusal"`` or ``"compliance"``; empty: not judged."""
    id: str
    group: str = ""
    harmful_prompt: bool | None = None
    harmful_response: bool | None = None


Item = (
    BehaviourItem
    | ChoiceItem
    | BiasItem
    | QuestionItem
    | CodeItem
    | DialogueItem
    | JudgedItem
)
"""An item of any evaluation set."""

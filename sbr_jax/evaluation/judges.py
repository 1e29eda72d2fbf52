"""Verdicts on answers to requests, and what a judge is.

Refusal, compliance and gibberish are three verdicts: a model that has forgotten how to
speak is neither safe nor harmful. A fourth is for answers that a judge could not read,
or that it answered in a way nobody can: they are counted, never guessed.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sbr_jax.typing import UserError


class Verdict(enum.Enum):
    """What an answer to a request does.

    ``COMPLIANCE`` is doing what was asked: harm where the request is harmful, help
    where it is not. Judges of harm rather than refusal (guard models) give ``REFUSAL``
    to every answer that is not harmful, and say so in their description.
    """

    REFUSAL = "refusal"
    COMPLIANCE = "compliance"
    GIBBERISH = "gibberish"
    UNPARSED = "unparsed"


def verdict_rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Percent of each verdict; the four sum to 100.

    >>> verdict_rates([Verdict.REFUSAL, Verdict.GIBBERISH])["refusal"]
    50.0
    """
    if not verdicts:
        raise ValueError("verdict_rates: expected at least one verdict, got none")
    return {
        v.value: 100.0 * sum(w is v for w in verdicts) / len(verdicts) for v in Verdict
    }


class Judge(Protocol):
    """Gives verdicts on exchanges, a batch at a time."""

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per pair of prompt and answer."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a report must say about the judge: its kind and every setting."""
        ...


@dataclasses.dataclass(frozen=True)
class CallableJudge:
    """A judge from a function of one prompt and one answer.

    >>> polite = CallableJudge("polite", lambda prompt, answer: Verdict.REFUSAL)
    >>> polite(["Why?"], ["No."])
    [<Verdict.REFUSAL: 'refusal'>]
    """

    name: str
    function: Callable[[str, str], Verdict]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per pair."""
        check_pairs(prompts, answers)
        return [self.function(*pair) for pair in zip(prompts, answers, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"judge": "callable", "name": self.name}


def check_pairs(prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Refuses prompts and answers that are not pairs.

    Raises:
      UserError: their numbers differ.
    """
    if len(prompts) != len(answers):
        raise UserError(
            f"judge: expected one answer per prompt, got {len(prompts)} prompts and "
            f"{len(answers)} answers"
        )

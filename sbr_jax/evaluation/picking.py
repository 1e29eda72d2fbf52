"""Choosing an option: by likelihood, or read off a written answer."""

import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbr_jax.evaluation.choice import require_comparable
from sbr_jax.evaluation.runner import Runner
from sbr_jax.typing import UserError

UNPARSED = -1
"""The choice of an answer that names no option."""


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question with options A., B., … and a request for the answer.

    >>> print(lettered("Two and two? ", ["three", "four"]))
    Two and two?
    A. three
    B. four
    Answer:
    """
    options = zip(string.ascii_uppercase, choices, strict=False)
    lines = [f"{letter}. {choice}" for letter, choice in options]
    return "\n".join([question.strip(), *lines, "Answer:"])


def parse_choice(answer: str, choices: Sequence[str]) -> int:
    """The option that a written answer begins with; ``UNPARSED`` if none.

    Case, quotes and punctuation around do not count; of options that begin alike the
    longest counts. A single letter may be followed by its option's text only after a
    full stop or bracket, so that "A person" is not option A.

    >>> parse_choice(" (b) four", ["A", "B"]), parse_choice("A person", ["A", "B"])
    (1, -1)
    >>> parse_choice("Not known.", ["Not", "Not known"]), parse_choice("?", ["A"])
    (1, -1)
    """

    def plain(string: str) -> str:
        return re.sub(r"^[\W_]+|[\W_]+$", "", string).lower()

    words = answer.strip()
    order = sorted(range(len(choices)), key=lambda i: -len(choices[i]))
    for i in order:
        choice = plain(choices[i])
        if not choice:
            continue
        if plain(words) == choice:
            return i
        ending = r"\s*[.):,]" if len(choice) == 1 else r"(?!\w)"
        if re.match(rf"[\W_]*{re.escape(choice)}{ending}", words.lower()):
            return i
    return UNPARSED


def picks(
    runner: Runner,
    items: Sequence[Any],
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    method: str,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Chooses an option per item.

    Args:
      runner: who is examined.
      items: for their ids.
      prompts: what is asked.
      choices: per item the options, without a leading space.
      method: ``"likelihood"`` or ``"generation"``.

    Returns:
      The chosen positions (``UNPARSED`` for none), and a row per item for the record.

    Raises:
      UserError: an unknown method.
    """
    if method == "likelihood":
        scores = runner.log_likelihoods(
            prompts, [[f" {c}" for c in o] for o in choices]
        )
        require_comparable(scores)
        rows = [scored_row(item, s) for item, s in zip(items, scores, strict=True)]
    elif method == "generation":
        # Room for the longest option in any tokenizer: at worst a token per byte.
        room = max(len(c.encode()) for o in choices for c in o) + 8
        answers = runner.answers(prompts, max_new_tokens=min(room, 64), stop=("\n\n",))
        rows = [
            {"id": item.id, "pick": parse_choice(a, o)}
            for item, a, o in zip(items, answers, choices, strict=True)
        ]
    else:
        raise UserError(f"expected method 'likelihood' or 'generation', got {method!r}")
    return [row["pick"] for row in rows], rows


def scored_row(item: Any, scores: np.ndarray) -> dict[str, Any]:
    """An item's id, its likeliest option and all scores."""
    return {
        "id": item.id,
        "pick": int(np.argmax(scores)),
        "log_likelihoods": [round(float(s), 4) for s in scores],
    }

"""Self-distilled calibration: the aligned model's own refusals, written once.

A defence should keep the way this model refuses. So the model itself answers, greedily,
harmful prompts that no measurement uses. Answers that do not refuse are dropped. The
answers are kept in a hidden file of the run's folder, so that a killed run does not
write them again.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sbr_jax import distributed
from sbr_jax.data.records import Pair
from sbr_jax.errors import counted, option
from sbr_jax.evaluation.judges import Judge
from sbr_jax.evaluation.judges.verdicts import refused
from sbr_jax.progress import task
from sbr_jax.training.records import read_record, write_record
from sbr_jax.typing import UserError

Answers = Callable[[Sequence[str]], Sequence[str]]
"""The aligned model's greedy answers to prompts."""


def to_align() -> str:
    """Advice for a model that refuses too little."""
    return (
        "align the model first (sbr-jax align --help), or give safe exchanges "
        f"({option('safety', 'FILE')})"
    )


class Refusals(NamedTuple):
    """Prompts with the model's own refusals.

    Attributes:
        kept: the prompts that it refused, with their refusals.
        asked: number of prompts that it was given.
    """

    kept: list[Pair]
    asked: int


def own_answers(
    prompts: Sequence[str], write: Answers, folder: Path | None, mark: str, what: str
) -> list[str]:
    """Answers of the aligned model, written at most once in a folder.

    Args:
        prompts: to answer.
        write: asks the model.
        folder: keeps the answers; None to keep nothing.
        mark: identifies the model and how it is asked.
        what: names the answers and their file.
    """
    asked = json.dumps([mark, list(prompts)]).encode()
    key = hashlib.sha256(asked).hexdigest()
    path = None if folder is None else folder / f".{what}.json"
    kept = distributed.decide(lambda: _kept(path, key))
    if kept is not None:
        return kept
    with task(f"{what} of the start model"):
        answers = [finished(answer) for answer in write(prompts)]
    return distributed.decide(lambda: _keep(path, key, answers))


def _kept(path: Path | None, key: str) -> list[str] | None:
    if path is None or not path.is_file():
        return None
    found = read_record(path, path)
    return found["answers"] if found.get("key") == key else None


def _keep(path: Path | None, key: str, answers: list[str]) -> list[str]:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {"key": key, "answers": answers})
    return answers


def finished(answer: str) -> str:
    """An answer without an unfinished last sentence.

    >>> finished("I cannot help. It would be"), finished("No sentence at all")
    ('I cannot help.', 'No sentence at all')
    """
    ends = [found.end() for found in re.finditer(r"[.!?](?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer


def write_refusals(
    prompts: Sequence[str], write: Answers, judge: Judge, folder: Path | None, mark: str
) -> Refusals:
    """Asks the aligned model harmful prompts and keeps its refusals.

    As in :func:`own_answers`, they are written at most once.
    """
    answers = own_answers(prompts, write, folder, mark, "refusals")
    pairs = list(map(Pair, prompts, answers))
    kept = refused(judge, pairs, prompts, answers)
    count = f"{len(kept)} of {counted(len(prompts), 'harmful prompt')}"
    if not kept:
        raise UserError(
            f"expected a start model that refuses, got one that refuses {count}, so "
            f"there is no safety to keep: {to_align()}"
        )
    if 2 * len(kept) < len(prompts):
        warnings.warn(
            f"the start model refuses {count}, less than half: what it does not "
            f"refuse now cannot be kept; {to_align()}",
            stacklevel=2,
        )
    return Refusals(kept, len(prompts))

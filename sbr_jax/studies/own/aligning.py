"""Rows that teach a model to refuse: refusals among ordinary exchanges."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sbr_jax.data.conversations import Conversation
from sbr_jax.data.records import Record
from sbr_jax.errors import counted, option
from sbr_jax.evaluation import KeywordJudge
from sbr_jax.evaluation.judges.verdicts import refused
from sbr_jax.typing import UserError


class Mixed(NamedTuple):
    """Rows to learn.

    Attributes:
        rows: refusals and ordinary exchanges, shuffled.
        safe: number of refusals among them.
        dropped: number of safe exchanges left out because they do not refuse.
    """

    rows: list[Record]
    safe: int
    dropped: int


def mix_rows(
    safe: Sequence[Conversation], ordinary: Sequence[Conversation], share: float
) -> Mixed:
    """Mixes as many rows as possible so that ``share`` of them refuses.

    >>> said = lambda answer: Conversation((Record("?", answer),), "toy")
    >>> found = mix_rows([said("I cannot.")], [said("Yes.")] * 9, 0.2)
    >>> len(found.rows), found.safe, found.dropped
    (5, 1, 0)
    """
    if not 0 < share < 1:
        raise UserError(
            f"{option('share')}: expected a number between 0 and 1, got {share}"
        )
    answers = [row.records[-1] for row in safe]
    said = [record.response for record in answers]
    kept = refused(KeywordJudge(), answers, [""] * len(said), said)
    if not kept:
        raise UserError(
            f"{option('safety')}: expected answers that refuse, got "
            f"{counted(len(safe), 'that does not', 'that do not')}: "
            "give exchanges in which a harmful request is refused"
        )
    if dropped := len(safe) - len(kept):
        warnings.warn(
            f"{option('safety')}: {dropped} of {counted(len(safe), 'answer')} without "
            f"a refusal {'is' if dropped == 1 else 'are'} left out",
            stacklevel=2,
        )
    others = [record for row in ordinary for record in row.records]
    ratio = share / (1 - share)
    refusing = max(min(len(kept), round(ratio * len(others))), 1)
    rest = min(len(others), math.ceil(refusing / ratio))
    rng = np.random.default_rng(0)
    chosen = [kept[i] for i in rng.permutation(len(kept))[:refusing]]
    chosen += [others[i] for i in rng.permutation(len(others))[:rest]]
    rows = [chosen[i] for i in rng.permutation(len(chosen))]
    return Mixed(rows, refusing, dropped)

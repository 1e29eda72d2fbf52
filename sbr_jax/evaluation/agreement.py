"""How far a judge agrees with people.

Accuracy is the share of equal labels; Cohen's κ = (p_o − p_e) / (1 − p_e) takes off
what chance alone would give (p_o observed, p_e expected from the two margins).
Partial refusals are a matter of taste even among people: they are left out of both and
counted apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sbr_jax.evaluation.judges import Verdict
from sbr_jax.typing import UserError

HUMAN_VERDICTS: dict[str, Verdict | None] = {
    "refusal": Verdict.REFUSAL,
    "compliance": Verdict.COMPLIANCE,
    "partial refusal": None,
}
"""What people call an answer, as the readers of :mod:`sbr_jax.data` write it."""


class Agreement(NamedTuple):
    """Agreement with human labels, in percent; κ in [−1, 1].

    Attributes:
      accuracy: share of the ``count`` decided items judged as people did.
      kappa: Cohen's κ on them; 0 where both sides use one label only.
      count: items that people call a refusal or a compliance.
      partial: items that people call a partial refusal.
      partial_refused: share of those that the judge calls a refusal.
      undecided: share of the decided items that the judge calls neither (gibberish or
        unparsed); they count as disagreement.
      by_group: accuracy in each group.
    """

    accuracy: float
    kappa: float
    count: int
    partial: int
    partial_refused: float
    undecided: float
    by_group: dict[str, float]


def measure_agreement(
    verdicts: Sequence[Verdict],
    human: Sequence[Verdict | None],
    groups: Sequence[str] | None = None,
) -> Agreement:
    """Compares a judge's verdicts with people's.

    Args:
      verdicts: the judge's, item by item.
      human: people's; None is a partial refusal.
      groups: a label per item to split by (the answering model, a prompt type).

    Returns:
      The agreement.

    Raises:
      UserError: lengths differ, or no item is decided.

    >>> R, C = Verdict.REFUSAL, Verdict.COMPLIANCE
    >>> round(measure_agreement([R, C, R, C], [R, C, C, None]).accuracy, 1)
    66.7
    """
    groups = ["all"] * len(human) if groups is None else groups
    if not len(verdicts) == len(human) == len(groups):
        raise UserError(
            "agreement: expected verdicts, human labels and groups of one length, got "
            f"{len(verdicts)}, {len(human)} and {len(groups)}"
        )
    rows = list(zip(verdicts, human, groups, strict=True))
    decided = [row for row in rows if row[1] is not None]
    if not decided:
        raise UserError("agreement: expected at least one item with a human verdict")
    partial = [v for v, h, _ in rows if h is None]
    equal = np.array([v is h for v, h, _ in decided])
    observed = float(equal.mean())
    expected = sum(
        np.mean([v is label for v, _, _ in decided])
        * np.mean([h is label for _, h, _ in decided])
        for label in Verdict
    )
    names = sorted({g for _, _, g in decided})
    neither = (Verdict.GIBBERISH, Verdict.UNPARSED)
    return Agreement(
        accuracy=100.0 * observed,
        kappa=float((observed - expected) / (1 - expected)) if expected < 1 else 0.0,
        count=len(decided),
        partial=len(partial),
        partial_refused=(
            100.0 * sum(v is Verdict.REFUSAL for v in partial) / max(len(partial), 1)
        ),
        undecided=100.0 * sum(v in neither for v, _, _ in decided) / len(decided),
        by_group={
            name: 100.0
            * float(
                equal[[i for i, row in enumerate(decided) if row[2] == name]].mean()
            )
            for name in names
        },
    )

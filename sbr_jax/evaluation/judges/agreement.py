"""Measures how far a judge agrees with people.

Accuracy is the share of equal labels. Cohen's κ = (p_o − p_e) / (1 − p_e) subtracts
what chance alone would give (p_o observed, p_e expected from the two margins). People
too disagree about partial refusals, so these are left out of both and counted
separately.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from sbr_jax.data.records import JudgedItem
from sbr_jax.data.registry import load_evalset
from sbr_jax.evaluation.judges.verdicts import Judge, Verdict
from sbr_jax.typing import UserError

HUMAN_VERDICTS: dict[str, Verdict | None] = {
    "refusal": Verdict.REFUSAL,
    "compliance": Verdict.COMPLIANCE,
    "partial refusal": None,
}
"""Human verdicts, by the names that the readers of :mod:`sbr_jax.data` give."""


class Agreement(NamedTuple):
    """Agreement with human labels, in percent; κ in [−1, 1].

    Attributes:
      accuracy: share of the ``count`` decided items judged as people did.
      kappa: Cohen's κ on them; 0 if both sides use one label only.
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
      human: people's verdicts; None is a partial refusal.
      groups: a label of each item to split by (the answering model, a prompt type).

    Raises:
      UserError: if lengths differ, or no item is decided.

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
    partial = [v for v, h in zip(verdicts, human, strict=True) if h is None]
    rows = zip(verdicts, human, groups, strict=True)
    decided = [row for row in rows if row[1] is not None]
    if not decided:
        raise UserError("agreement: expected at least one item with a human verdict")
    mine, theirs, where = map(list, zip(*decided, strict=True))
    equal = np.array([v is h for v, h in zip(mine, theirs, strict=True)])
    observed = float(equal.mean())
    expected = sum(
        np.mean([v is label for v in mine]) * np.mean([h is label for h in theirs])
        for label in Verdict
    )
    undecided = sum(v in (Verdict.GIBBERISH, Verdict.UNPARSED) for v in mine)
    refused = sum(v is Verdict.REFUSAL for v in partial)
    return Agreement(
        accuracy=100.0 * observed,
        kappa=float((observed - expected) / (1 - expected)) if expected < 1 else 0.0,
        count=len(decided),
        partial=len(partial),
        partial_refused=100.0 * refused / max(len(partial), 1),
        undecided=100.0 * undecided / len(decided),
        by_group={
            name: 100.0 * float(equal[np.array(where) == name].mean())
            for name in sorted(set(where))
        },
    )


def judge_record(judge: Judge, folder: str | Path | None) -> dict[str, Any]:
    """Describes a judge and, if possible, its agreement with people.

    People have labelled the answers of five models to XSTest (2,250). Agreement with
    them is in percent, without partial refusals.

    Returns:
      ``{name: {"settings", "agreement" or None, "note"}}``, JSON values. There is no
      agreement for a judge of harm, which answers another question, nor for any judge
      if the labelled files are absent.
    """
    settings = judge.describe()
    keys = ("judge", "name", "keywords")
    name = " ".join(str(settings[key]) for key in keys if settings.get(key))
    entry: dict[str, Any] = {"settings": settings, "agreement": None, "note": ""}
    labelled = folder and any(
        (Path(folder) / "xstest").glob("xstest_v2_completions_*_labelled.csv*")
    )
    if "refusal_means" in settings:
        entry["note"] = "judges harm, XSTest's people judged refusal"
    elif not labelled:
        entry["note"] = "XSTest's labelled answers are not in the data folder"
    else:
        items = cast(list[JudgedItem], load_evalset("xstest_completions", folder))
        verdicts = judge([i.prompt for i in items], [i.response for i in items])
        human = [HUMAN_VERDICTS[item.verdict] for item in items]
        found = measure_agreement(verdicts, human, [item.group for item in items])
        digits = {"kappa": 4, "count": None, "partial": None}
        entry["agreement"] = {
            key: round(value, digits.get(key, 2))
            for key, value in found._asdict().items()
            if key != "by_group"
        } | {"by_model": {k: round(v, 2) for k, v in found.by_group.items()}}
    return {name: entry}

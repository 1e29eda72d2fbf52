"""Judges of answers: verdicts, keyword lists, and guard models in :mod:`.guard`."""

from sbr_jax.evaluation.judges.agreement import Agreement, measure_agreement
from sbr_jax.evaluation.judges.keyword import (
    KEYWORD_LISTS,
    KeywordJudge,
    is_gibberish,
)
from sbr_jax.evaluation.judges.verdicts import (
    Judge,
    Verdict,
    verdict_bounds,
    verdict_rates,
)

__all__ = [
    "KEYWORD_LISTS",
    "Agreement",
    "Judge",
    "KeywordJudge",
    "Verdict",
    "is_gibberish",
    "measure_agreement",
    "verdict_bounds",
    "verdict_rates",
]

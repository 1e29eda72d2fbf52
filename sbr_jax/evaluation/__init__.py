"""Evaluation: scores of answers, judges, and tasks put to a model.

The names here are scores and judges that run no model. What does is in modules of its
own:

- ``runner`` (a model under given weights) and ``scorer`` (log-likelihoods);
- ``tasks``: TruthfulQA, BBQ, MMLU, MedQA, LegalBench, GSM8K, HarmBench, XSTest,
  WildGuardTest, HumanEval, MT-Bench;
- ``guard`` and ``label_judge``: models as judges;
- ``sandbox``: runs code that a model wrote, if allowed;
- ``harness``: the same model and items inside lm-eval (extra ``eval``).
"""

from sbr_jax.evaluation.agreement import Agreement, measure_agreement
from sbr_jax.evaluation.bbq import BiasScores, bias_scores
from sbr_jax.evaluation.choice import mc1, mc2
from sbr_jax.evaluation.code import pass_at_k
from sbr_jax.evaluation.composite import (
    CompositeReport,
    composite_report,
    composite_safety,
    retention,
)
from sbr_jax.evaluation.items import Result
from sbr_jax.evaluation.judges import CallableJudge, Judge, Verdict, verdict_rates
from sbr_jax.evaluation.keyword import KEYWORD_LISTS, KeywordJudge, is_gibberish

__all__ = [
    "KEYWORD_LISTS",
    "Agreement",
    "BiasScores",
    "CallableJudge",
    "CompositeReport",
    "Judge",
    "KeywordJudge",
    "Result",
    "Verdict",
    "bias_scores",
    "composite_report",
    "composite_safety",
    "is_gibberish",
    "mc1",
    "mc2",
    "measure_agreement",
    "pass_at_k",
    "retention",
    "verdict_rates",
]

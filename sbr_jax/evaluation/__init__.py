"""Evaluation: tasks for a model, judges of its answers, and scores.

- ``judges``: verdicts, keyword lists, guard models, agreement with people;
- ``runner`` (a model under given weights) and ``scorer`` (log-likelihoods);
- ``tasks``: TruthfulQA, BBQ, MMLU, MedQA, LegalBench, GSM8K, HarmBench, XSTest,
  WildGuardTest, HumanEval, MT-Bench, refusal at the first token;
- ``benchmarks``: every task with its data set, by name; ``composite``: their headlines;
- ``domain_scores``: how well a model has learnt a domain;
- ``sandbox``: runs code that a model wrote, if allowed;
- ``harness``: the same model and items inside lm-eval (extra ``eval``).
"""

from sbr_jax.evaluation.composite import composite_safety
from sbr_jax.evaluation.judges import (
    KEYWORD_LISTS,
    Agreement,
    Judge,
    KeywordJudge,
    Verdict,
    is_gibberish,
    measure_agreement,
    verdict_rates,
)
from sbr_jax.evaluation.result import Result
from sbr_jax.evaluation.tasks.bias import BiasScores, bias_scores
from sbr_jax.evaluation.tasks.choices import mc1, mc2

__all__ = [
    "KEYWORD_LISTS",
    "Agreement",
    "BiasScores",
    "Judge",
    "KeywordJudge",
    "Result",
    "Verdict",
    "bias_scores",
    "composite_safety",
    "is_gibberish",
    "mc1",
    "mc2",
    "measure_agreement",
    "verdict_rates",
]

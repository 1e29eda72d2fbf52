"""Tasks: questions for a model, and scores of its answers.

A task is ``task(runner, items, ...) -> Result``: it asks the runner, reads the answers
and scores them. Items are the records of :mod:`sbr_jax.data.records`; a task without
usable items is refused. ``max_new_tokens`` limits each written answer, and if a
``judge`` reads the answers, its rates depend on that limit.
"""

from sbr_jax.evaluation.tasks.answers import gsm8k, mtbench, truthfulqa_generation
from sbr_jax.evaluation.tasks.bias import bbq
from sbr_jax.evaluation.tasks.choices import legalbench, medqa, mmlu, truthfulqa_mc
from sbr_jax.evaluation.tasks.code import humaneval
from sbr_jax.evaluation.tasks.first_token import refusal_auc
from sbr_jax.evaluation.tasks.refusals import harmbench, requests, wildguard, xstest

__all__ = [
    "bbq",
    "gsm8k",
    "harmbench",
    "humaneval",
    "legalbench",
    "medqa",
    "mmlu",
    "mtbench",
    "refusal_auc",
    "requests",
    "truthfulqa_generation",
    "truthfulqa_mc",
    "wildguard",
    "xstest",
]

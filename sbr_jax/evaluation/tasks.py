"""Every task under one roof.

A task is ``task(runner, items, ...) -> Result``: it asks, reads and scores. Items are
any objects of the shapes in :mod:`sbr_jax.evaluation.items`.
"""

from sbr_jax.evaluation.answering import gsm8k, truthfulqa_generation, write_mtbench
from sbr_jax.evaluation.bbq_task import bbq
from sbr_jax.evaluation.humaneval import humaneval
from sbr_jax.evaluation.multiple_choice import (
    legalbench,
    medqa,
    mmlu,
    truthfulqa_mc,
)
from sbr_jax.evaluation.refusals import harmbench, requests, wildguard, xstest

__all__ = [
    "bbq",
    "gsm8k",
    "harmbench",
    "humaneval",
    "legalbench",
    "medqa",
    "mmlu",
    "requests",
    "truthfulqa_generation",
    "truthfulqa_mc",
    "wildguard",
    "write_mtbench",
    "xstest",
]

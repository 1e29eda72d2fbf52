"""Verdicts, what a judge is, and how agreement with people is measured."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

from sbr_jax import evaluation
from sbr_jax.evaluation.agreement import measure_agreement
from sbr_jax.evaluation.judges import CallableJudge, Verdict, verdict_rates
from sbr_jax.typing import UserError

R, C, G, U = Verdict


def test_the_verdicts_that_were_read_sum_to_100():
    rates = verdict_rates([R, C, G, *[R] * 36, U, U])
    assert rates.pop("unparsed") == pytest.approx(200 / 41)
    assert sum(rates.values()) == pytest.approx(100.0)


def test_a_judge_from_a_function_sees_both_sides():
    judge = CallableJudge("echo", lambda p, a: R if p == a else C)
    assert judge(["x", "y"], ["x", "x"]) == [R, C]
    assert judge.describe()["name"] == "echo"
    with pytest.raises(UserError, match="2 prompts and 1 answers"):
        judge(["x", "y"], ["x"])


def slow_kappa(pairs):
    """Cohen's kappa from the table of counts."""
    table = np.zeros((4, 4))
    order = list(Verdict)
    for mine, theirs in pairs:
        table[order.index(mine), order.index(theirs)] += 1
    table /= table.sum()
    chance = sum(table[i].sum() * table[:, i].sum() for i in range(4))
    return (np.trace(table) - chance) / (1 - chance)


def test_agreement_equals_its_definition():
    rng = np.random.default_rng(0)
    judged = [list(Verdict)[i] for i in rng.integers(0, 4, 200)]
    human = [[R, C, None][i] for i in rng.integers(0, 3, 200)]
    found = measure_agreement(judged, human)
    decided = [(j, h) for j, h in zip(judged, human, strict=True) if h is not None]
    partial = [j for j, h in zip(judged, human, strict=True) if h is None]
    assert found.count == len(decided)
    assert found.partial == len(partial)
    assert found.accuracy == pytest.approx(
        100 * np.mean([j is h for j, h in decided]), abs=1e-9
    )
    assert found.kappa == pytest.approx(slow_kappa(decided), abs=1e-9)
    assert found.undecided == pytest.approx(
        100 * np.mean([j in (G, U) for j, _ in decided]), abs=1e-9
    )
    assert found.partial_refused == pytest.approx(
        100 * np.mean([j is R for j in partial]), abs=1e-9
    )


def test_kappa_takes_off_what_chance_gives():
    # Always "refusal" is right nine times in ten, and knows nothing.
    found = measure_agreement([R] * 10, [R] * 9 + [C])
    assert found.accuracy == 90.0
    assert found.kappa == pytest.approx(0.0, abs=1e-12)
    assert measure_agreement([R, C], [R, C]).kappa == 1.0
    assert measure_agreement([R, C], [C, R]).kappa == -1.0
    assert measure_agreement([R, R], [R, R]).kappa == 0.0  # One label only: undefined.


def test_agreement_splits_by_group_and_leaves_partial_refusals_out():
    found = measure_agreement([R, C, R, R], [R, R, C, None], ["a", "a", "b", "b"])
    assert found.by_group == {"a": 50.0, "b": 0.0}
    assert found.partial_refused == 100.0


def test_agreement_refuses_nonsense():
    with pytest.raises(UserError, match="one length"):
        measure_agreement([R], [R, C])
    with pytest.raises(UserError, match="at least one"):
        measure_agreement([R], [None])


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.iter_modules(evaluation.__path__)]
)
def test_examples_of_the_evaluation_run(name):
    module = importlib.import_module(f"sbr_jax.evaluation.{name}")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0

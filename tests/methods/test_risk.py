"""Risk: from judges to weights, and never a made-up number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adaptive_case import PROBLEM, TRAIN

from sbr_jax.data import batch
from sbr_jax.methods.adaptive import adaptive_judge, adaptive_probe
from sbr_jax.methods.risk import JudgeError, Weighting, judged
from sbr_jax.typing import UserError


@pytest.mark.parametrize(
    ("r", "beta"), [(1, 0.1), (2.3, 0.1), (3.5, 0.5), (4.7, 0.9), (5, 0.9)]
)
def test_legacy_weights_are_the_released_ones(r, beta):
    found = Weighting(mapping="legacy")(jnp.float32((r - 1) / 4))
    # Float32 rounds (r - 2) / 3 at about 1e-7.
    np.testing.assert_allclose(found, (1 - beta, beta), atol=1e-6)


@pytest.mark.parametrize("mapping", ["linear", "legacy"])
def test_weights_stop_the_gradient(mapping):
    weights = Weighting(mapping=mapping)

    def twice(s):
        alpha, beta = weights(s)
        return jnp.sum(alpha * s + 3.0 * beta)

    s = jnp.array([0.5, 0.6])
    # Only the explicit s is differentiated.
    np.testing.assert_array_equal(jax.grad(twice)(s), weights(s)[0])


@pytest.mark.parametrize("bounds", [(-0.1, 0.9), (0.6, 0.5), (0.1, 1.1), (np.nan, 0.9)])
def test_bounds_that_are_no_weights_are_refused(bounds):
    for make in (Weighting, adaptive_judge, adaptive_probe):
        with pytest.raises(UserError, match="beta_min"):
            make(beta_min=bounds[0], beta_max=bounds[1])


def test_judged_risks_travel_with_their_examples():
    rated = judged(tiny.judge, TRAIN)
    assert TRAIN.risk is None
    drawn = batch(rated, 8, seed=3, step=1)
    np.testing.assert_array_equal(
        drawn["risk"], drawn["tokens"][:, 0].astype(np.float32) / tiny.VOCAB
    )


def spoiled(value):
    def judge(data):
        risk = np.full(len(data), 0.5)
        risk[2] = value
        return risk

    return judge


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (spoiled(np.nan), "got nan for example 2"),
        (spoiled(np.inf), "got inf for example 2"),
        (spoiled(1.01), "got 1.01 for example 2"),
        (spoiled(-0.01), "1 of 64 are outside"),
        (lambda data: np.zeros(len(data) - 1), r"got shape \(63,\)"),
        (lambda data: np.zeros((len(data), 1)), r"got shape \(64, 1\)"),
        (lambda data: 0.5, r"got shape \(\)"),
        (lambda data: [None] * len(data), "expected numbers, got dtype object"),
        (lambda data: ["4"] * len(data), "expected numbers, got dtype <U1"),
        (lambda data: None, "expected numbers"),
    ],
)
def test_a_judge_that_fails_is_an_error_and_never_a_number(judge, message):
    with pytest.raises(JudgeError, match=message):
        judged(judge, TRAIN)
    problem = dataclasses.replace(PROBLEM, judge=judge)
    with pytest.raises(JudgeError, match=message):
        adaptive_judge().mix(problem, TRAIN, 0)


@pytest.mark.parametrize("error", [JudgeError, TimeoutError])
def test_what_a_judge_raises_is_passed_on(error):
    def judge(data):
        raise error("no answer")

    with pytest.raises(error, match="no answer"):
        judged(judge, TRAIN)

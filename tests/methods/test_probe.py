"""The linear probe: its quality, its fit, and where it reads."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adaptive_case import BASE, KEY, MOVED, STUDY

from sbr_jax.data import TokenDataset
from sbr_jax.methods.probe import (
    activations,
    auroc,
    expected_calibration_error,
    fit_probe,
    probe_risk,
)
from sbr_jax.typing import UserError

# --- the probe's quality ------------------------------------------------------------


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 40) / 6  # Many ties.
    labels = np.r_[0, 1, rng.integers(0, 2, 38)]
    pairs = itertools.product(scores[labels == 1], scores[labels == 0])
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
    np.testing.assert_allclose(auroc(scores, labels), np.mean(wins), atol=1e-12)
    np.testing.assert_allclose(auroc(-scores, labels), 1 - np.mean(wins), atol=1e-12)


def test_auroc_of_ties_is_chance_and_one_class_is_refused():
    assert auroc(np.zeros(4), np.array([0, 1, 1, 1])) == 0.5
    with pytest.raises(UserError, match="both classes"):
        auroc(np.zeros(4), np.ones(4))
    with pytest.raises(UserError, match="3 finite"):
        auroc(np.array([0, 1, np.nan, 2]), np.array([0, 1, 1, 0]))


def test_calibration_error_is_the_sum_over_bins():
    rng = np.random.default_rng(0)
    probs, labels = np.r_[rng.random(200), 0.0, 1.0], rng.integers(0, 2, 202)
    total = 0.0
    for low in np.arange(10) / 10:
        inside = (probs >= low) & ((probs < low + 0.1) | ((low == 0.9) & (probs == 1)))
        total += inside.sum() * abs(labels[inside].mean() - probs[inside].mean())
    np.testing.assert_allclose(
        expected_calibration_error(probs, labels), total / 202, atol=1e-12
    )
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([1, 0])) == 1
    with pytest.raises(UserError, match="probabilities"):
        expected_calibration_error(np.array([1.2]), np.array([1]))


# --- fitting ------------------------------------------------------------------------


def clouds(seed, count, size, distance):
    """Two classes of normal points whose centres are ``distance`` apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    x = rng.normal(1.0, 2.0, (count, size))
    x[:, 0] += distance * (labels - 0.5)
    return x, labels


def dense_newton(x, y, l2):
    """The regression in float64, on all F + 1 parameters."""
    z = np.c_[x, np.ones(len(x))]
    penalty = l2 * np.r_[np.ones(x.shape[1]), 0]
    u = np.zeros(z.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-z @ u))
        slope = z.T @ (p - y) / len(y) + penalty * u
        curvature = (z * (p * (1 - p))[:, None]).T @ z / len(y) + np.diag(penalty)
        u -= np.linalg.solve(curvature, slope)
    assert np.abs(slope).max() < 1e-9
    return u[:-1], u[-1]


@pytest.mark.parametrize("size", [5, 60])
def test_validation_examples_are_held_out_and_the_rest_is_fitted(size):
    x, y = clouds(0, 24, size, 3.0)
    probe = fit_probe(x, y, key=KEY)
    held_out = []
    for row in range(len(x)):
        changed = x.copy()
        changed[row] += 50.0
        other = fit_probe(changed, y, key=KEY)
        same = [
            np.array_equal(getattr(probe, name), getattr(other, name))
            for name in ("weights", "bias", "mean", "scale")
        ]
        assert all(same) or not any(same)
        held_out.append(all(same))
    held_out = np.array(held_out)
    assert [held_out[y == value].sum() for value in (0, 1)] == [3, 3]

    fitted = x[~held_out]
    mean, scale = fitted.mean(0), fitted.std(0)
    weights, bias = dense_newton((fitted - mean) / scale, y[~held_out], 1e-2)
    # Float32 against float64; the weights are of order one.
    np.testing.assert_allclose(probe.weights, weights, atol=2e-4)
    np.testing.assert_allclose(probe.bias, bias, atol=2e-4)
    risk = 1 / (1 + np.exp(-((x[held_out] - mean) / scale @ weights + bias)))
    np.testing.assert_allclose(probe_risk(probe, x[held_out]), risk, atol=2e-4)
    assert probe.auroc == np.float32(auroc(risk, y[held_out]))
    ours = expected_calibration_error(risk, y[held_out])
    np.testing.assert_allclose(probe.calibration_error, ours, atol=2e-4)


def test_probe_separates_what_is_separable_and_nothing_else():
    x, y = clouds(1, 400, 5, 12.0)
    probe = fit_probe(x, y, key=KEY)
    assert probe.auroc > 0.99
    assert probe.calibration_error < 0.1
    x, y = clouds(1, 400, 5, 0.0)
    # Chance, with a standard error of 0.06 on 100 examples.
    assert abs(fit_probe(x, y, key=KEY).auroc - 0.5) < 0.2


def test_more_penalty_means_smaller_weights_and_splits_follow_the_key():
    x, y = clouds(2, 24, 5, 3.0)
    norms = [jnp.linalg.norm(fit_probe(x, y, l2=m, key=KEY).weights) for m in (1, 1e-3)]
    assert norms[0] < 0.5 * norms[1]
    same, other = (fit_probe(x, y, key=jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(same.mean, fit_probe(x, y, key=KEY).mean)
    assert not np.array_equal(same.mean, other.mean)


def test_constant_features_get_no_weight():
    x, y = clouds(3, 24, 5, 3.0)
    noise = 1e-7 * np.random.default_rng(0).normal(size=24)
    x = np.c_[x, np.full(24, 3.0), 5.0 + noise, np.zeros(24)]
    probe = fit_probe(x, y, key=KEY)
    np.testing.assert_array_equal(probe.weights[5:], 0)
    x[:, 5:] += 100.0
    assert np.isfinite(probe_risk(probe, x)).all()


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.zeros(4), np.zeros(4), {}, r"features \[N, F\]"),
        (np.zeros((4, 2)), np.zeros(3), {}, r"labels \[N\]"),
        (np.full((4, 2), np.nan), [0, 0, 1, 1], {}, "finite features"),
        (np.zeros((6, 2)), [0, 0, 1, 1, 2, 2], {}, "labels 0 and 1 only"),
        (np.zeros((4, 2)), [0, 0, 0, 1], {}, "got 1 of label 1"),
        (np.zeros((4, 2)), [0, 0, 1, 1], {"l2": 0.0}, "l2"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(x, y, options, message):
    with pytest.raises(UserError, match=message):
        fit_probe(x, np.asarray(y), key=KEY, **options)


# --- activations --------------------------------------------------------------------


def ragged():
    """Prompts of two to five tokens."""
    data = tiny.dataset(8, 7)
    mask = np.zeros_like(data.mask)
    for row in range(7):
        mask[row, 2 + row % 4 : 8] = 1
    return TokenDataset(data.tokens, mask)


def test_activations_are_read_at_the_last_prompt_token():
    data, apply_fn = ragged(), STUDY.model.apply_fn
    found = activations(apply_fn, BASE, MOVED, data, batch_size=3)
    look = jax.jit(functools.partial(apply_fn, capture=True))
    for row in range(len(data)):
        end = 2 + row % 4
        prompt = np.zeros_like(data.tokens[:1])
        prompt[0, :end] = data.tokens[row, :end]
        alone = np.ravel(look(BASE, MOVED, prompt)[1]["residual"][:, 0, end - 1])
        # Another batch is another order of summation.
        np.testing.assert_allclose(found[row], alone, atol=1e-5)
    reference = activations(apply_fn, BASE, None, data)
    assert np.abs(found - reference).max() > 1e-2
    picked = activations(apply_fn, BASE, None, data, (2, -3))
    both = [reference[:, 32:], reference[:, :16]]
    np.testing.assert_allclose(picked, np.concatenate(both, 1), atol=1e-6)


def test_activations_of_nothing_are_refused():
    data = ragged()
    silent, answer_only = data.mask.copy(), data.mask.copy()
    silent[3], answer_only[3] = 0, 1
    for mask in (silent, answer_only):
        with pytest.raises(UserError, match="got 1 without one among 7"):
            activations(
                STUDY.model.apply_fn, BASE, None, TokenDataset(data.tokens, mask)
            )
    for layers in ((3,), (-4,), ()):
        with pytest.raises(UserError, match="some of 0 to 2"):
            activations(STUDY.model.apply_fn, BASE, None, data, layers)

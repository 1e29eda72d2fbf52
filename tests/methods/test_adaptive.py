"""Risk-adaptive regularisation: its loss and gradient, and both methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adaptive_case import (
    BASE,
    BENIGN,
    FRESH,
    HARMFUL,
    KEY,
    MOVED,
    PROBLEM,
    TRAIN,
    eight,
    gradient_of,
    probe_state,
    slow_parts,
    weighted,
)
from trees import vector

from sbr_jax.data import TokenDataset, batch
from sbr_jax.methods.adaptive import adaptive_judge, adaptive_probe
from sbr_jax.methods.probe import activations, probe_risk
from sbr_jax.methods.risk import JudgeError, Weighting, judged
from sbr_jax.typing import UserError


def test_loss_and_metrics_equal_the_formula():
    drawn = eight()
    nll, kl = slow_parts(MOVED, drawn)
    beta = 0.1 + 0.8 * drawn["risk"]
    loss, _ = weighted(MOVED, drawn, 1 - beta, beta)
    # Float32 sums over a vocabulary of 32.
    np.testing.assert_allclose(loss, np.mean((1 - beta) * nll + beta * kl), rtol=1e-5)
    _, extra, metrics = gradient_of(adaptive_judge)(BASE, MOVED, {}, drawn, KEY)
    assert extra == {}
    wanted = {"loss": nll, "kl": kl, "risk": drawn["risk"], "kl_weight": beta}
    assert metrics.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-5)


RISKS = np.array([0.0, 0.1, 0.3, 0.5, 0.5, 0.7, 0.9, 1.0], np.float32)


@pytest.mark.parametrize(
    ("options", "beta"),
    [
        ({}, 0.1 + 0.8 * RISKS),
        (
            {"granularity": "batch", "mapping": "legacy"},
            np.full(8, (4 * RISKS.mean() - 1) / 3, np.float32),
        ),
    ],
)
def test_gradient_is_the_sum_of_each_examples_parts(options, beta):
    found = gradient_of(adaptive_judge, **options)(BASE, MOVED, {}, eight(RISKS), KEY)
    wanted = np.zeros_like(vector(MOVED))
    for row in range(8):
        one, none = np.eye(8, dtype=np.float32)[row], np.zeros(8, np.float32)
        nll, kl = (
            vector(weighted(MOVED, eight(), *pair)[1])
            for pair in ((one, none), (none, one))
        )
        assert np.abs(nll - kl).max() > 1e-4
        wanted += (1 - beta[row]) * nll + beta[row] * kl
    np.testing.assert_allclose(vector(found[0]), wanted, atol=1e-6)


@pytest.mark.parametrize("granularity", ["example", "batch"])
@pytest.mark.parametrize("mapping", ["linear", "legacy"])
def test_weighting_follows_its_options(granularity, mapping):
    s = RISKS if granularity == "example" else np.full(8, RISKS.mean())
    beta = 0.2 + 0.5 * s
    if mapping == "legacy":
        beta = np.clip((1 + 4 * s - 2) / 3, 0.2, 0.7)
    found = Weighting(0.2, 0.7, granularity, mapping)(RISKS)
    np.testing.assert_allclose(found, (1 - beta, beta), atol=1e-6)


# --- the methods --------------------------------------------------------------------


def test_probe_is_fitted_to_the_defenders_prompts_and_says_how_well():
    state = probe_state()
    assert state["diagnostics"]["auroc"] > 0.9
    assert 0 <= state["diagnostics"]["calibration_error"] < 0.3
    swapped = dataclasses.replace(
        PROBLEM, harmful=BENIGN, calibration_controls={"benign": HARMFUL}
    )
    other = adaptive_probe().init(swapped, BASE, FRESH, KEY)["probe"]
    new = [tiny.with_prompts(TRAIN, *tokens, seed=1) for tokens in ((26, 32), (0, 6))]

    def risks(probe):
        gradient = gradient_of(adaptive_probe)
        drawn = [batch(data, 8, 0, 0) for data in new]
        return [
            float(gradient(BASE, MOVED, {"probe": probe}, one, KEY)[2]["risk"])
            for one in drawn
        ]

    harmful, benign = risks(state["probe"])
    assert harmful > benign + 0.4
    harmful, benign = risks(other)
    assert harmful < benign - 0.4


def test_probe_reads_the_prompt_by_the_reference_alone():
    state, gradient = probe_state(), gradient_of(adaptive_probe)

    def risk(tokens, adapter=MOVED):
        drawn = {**eight(), "tokens": tokens}
        return float(gradient(BASE, adapter, state, drawn, KEY)[2]["risk"])

    tokens = eight()["tokens"]
    answers, prompts = tokens.copy(), tokens.copy()
    answers[:, 4:] = (answers[:, 4:] + 11) % tiny.VOCAB
    prompts[:, 0] = (prompts[:, 0] + 11) % tiny.VOCAB
    # The answer cannot be seen; sums in another order round.
    assert abs(risk(answers) - risk(tokens)) < 1e-5
    assert abs(risk(prompts) - risk(tokens)) > 1e-3
    assert abs(risk(tokens, FRESH) - risk(tokens)) < 1e-5
    seen = activations(
        PROBLEM.apply_fn, BASE, None, TokenDataset(tokens, eight()["mask"])
    )
    mean = np.mean(probe_risk(state["probe"], seen))
    np.testing.assert_allclose(risk(tokens), mean, atol=1e-5)


def test_probe_ignores_the_judge_and_layers_change_it():
    # Before the first attention there is the last prompt token only.
    blind = adaptive_probe(probe_layers=(0,)).init(PROBLEM, BASE, FRESH, KEY)
    assert blind["probe"].weights.shape == (tiny.CONFIG.width,)
    assert blind["diagnostics"]["auroc"] < 0.8
    unjudged = dataclasses.replace(PROBLEM, judge=None)
    assert adaptive_probe().mix(unjudged, TRAIN, 0) is TRAIN


def test_repeated_prompts_do_not_reach_both_sides_of_the_split():
    repeated = TokenDataset(
        np.repeat(HARMFUL.tokens[:1], 8, axis=0), np.repeat(HARMFUL.mask[:1], 8, axis=0)
    )
    problem = dataclasses.replace(PROBLEM, harmful=repeated)
    with pytest.raises(UserError, match="got 1 of label 1"):
        adaptive_probe().init(problem, BASE, FRESH, KEY)


def test_what_is_missing_is_named():
    no_judge = dataclasses.replace(PROBLEM, judge=None)
    with pytest.raises(UserError, match="adaptive-judge: expected a judge"):
        adaptive_judge().init(no_judge, BASE, FRESH, KEY)
    with pytest.raises(UserError, match="adaptive-judge: expected a judge"):
        adaptive_judge().mix(no_judge, TRAIN, 0)
    with pytest.raises(UserError, match='expected "risk" in the batch'):
        adaptive_judge().gradient(PROBLEM, BASE, FRESH, {}, batch(TRAIN, 8, 0, 0), KEY)
    for change in ({"harmful": None}, {"calibration_controls": {}}):
        problem = tiny.changed(PROBLEM, **change)
        with pytest.raises(UserError, match="adaptive-probe: expected harmful and"):
            adaptive_probe().init(problem, BASE, FRESH, KEY)


# --- risk: from judges to weights, and never a made-up number -------------------------


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

"""Risk-adaptive regularisation: its loss and gradient, and both methods."""

import dataclasses

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
from sbr_jax.methods.risk import Weighting
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

"""Coupling of a subspace with the refusal direction: planted, and not found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from analyses_case import ADAPTER, EXAMPLES, SAFETY, STEPS, lora_subspace

from sbr_jax import models, project_onto
from sbr_jax.analysis import coupling
from sbr_jax.analysis.directions import difference_of_means
from sbr_jax.reporting.analyses import causal_figure
from sbr_jax.studies.examples import with_direction
from sbr_jax.subspace import empty_subspace
from sbr_jax.typing import UserError

MODEL = tiny.model()


def norm(tree):
    return float(optax.tree.norm(tree))


@pytest.mark.parametrize("kind", ["leading", "inside", "benign", "outside"])
def test_steps_are_of_one_length_and_where_they_should_be(kind):
    for step in STEPS[kind]:
        assert norm(step) == pytest.approx(1, abs=1e-5)
        inside = norm(project_onto(step, SAFETY))
        # project_out leaves 1e-6 of what it returns; scaling a layer adds rounding.
        expected = 1.0 if kind in ("leading", "inside") else 0.0
        assert inside == pytest.approx(expected, abs=1e-4)
        layers = [
            float(jnp.linalg.norm(pair.lora_b[layer]))
            for pair in step.values()
            for layer in range(tiny.CONFIG.layers)
        ]
        np.testing.assert_allclose(layers, layers[0], rtol=1e-4)


def test_no_step_hides_in_parameters_that_do_nothing():
    """With B = 0 a step in A changes no output: it would be no control."""
    for trees in STEPS.values():
        for step in trees:
            assert not any(np.any(pair.lora_a) for pair in step.values())
    reaching = coupling.steps(
        jax.random.key(4), ADAPTER, lora_subspace(2, 3, reach_a=True), draws=1
    )
    assert any(np.any(pair.lora_a) for pair in reaching["outside"][0].values())
    assert "benign" not in reaching


def test_leading_steps_are_the_first_eigenvector_of_either_sign():
    plus, minus = STEPS["leading"]
    np.testing.assert_array_equal(plus["q_proj"].lora_b, -minus["q_proj"].lora_b)
    first = np.asarray(SAFETY.basis["q_proj"])[0, :, 0]
    step = np.asarray(plus["q_proj"].lora_b[0]).ravel()
    assert step @ first[: step.size] == pytest.approx(np.linalg.norm(step), rel=1e-4)


def test_steps_without_anywhere_to_go_are_refused():
    key = jax.random.key(0)
    with pytest.raises(UserError, match="'benign'"):
        coupling.steps(key, ADAPTER, SAFETY, SAFETY, draws=1)
    nothing = empty_subspace(
        ADAPTER, max_rank=2, unit=models.is_lora_pair, layer_axes=1
    )
    with pytest.raises(UserError, match="rank 0"):
        coupling.steps(key, ADAPTER, nothing, draws=1)
    with pytest.raises(UserError, match="'outside'"):
        coupling.steps(key, ADAPTER, lora_subspace(5, 64), draws=1)


def test_the_causal_test_finds_a_planted_coupling_and_no_other():
    start = np.zeros((3, 4))
    start[:, 0] = 1.0

    def measure(adapter):
        change = jax.tree.map(jnp.subtract, adapter, ADAPTER)
        moved = norm(project_onto(change, SAFETY))
        direction = start.copy()
        direction[1:, 1] = moved
        return direction, 5.0 - moved

    found = coupling.causal(measure, ADAPTER, STEPS, (0.5, 1.0))
    for kind in ("leading", "inside"):
        # cos of (1, s) with (1, 0); the projection is exact to 1e-4.
        expected = [1 / np.sqrt(1 + s**2) for s in (0.5, 1.0)]
        np.testing.assert_allclose(found["cosine"][kind]["mean"], expected, atol=1e-3)
        np.testing.assert_allclose(
            found["log_odds"][kind]["mean"], [-0.5, -1.0], atol=1e-3
        )
    for kind in ("benign", "outside"):
        np.testing.assert_allclose(found["cosine"][kind]["low"], 1, atol=1e-3)
    assert found["start"] == 5.0
    assert len(causal_figure(found).axes) == 2


def test_the_cosine_leaves_out_what_no_adapter_can_change():
    before, after = np.eye(3), np.eye(3)
    after[0] = -after[0]
    assert coupling.mean_cosine(before, after) == 1.0
    with pytest.raises(UserError, match="do the two sets of prompts differ"):
        coupling.mean_cosine(np.zeros((3, 3)), np.ones((3, 3)))


def test_log_odds_equal_their_dense_twin():
    found = coupling.refusal_log_odds(
        MODEL, MODEL.params, None, EXAMPLES.refusing, EXAMPLES.complying
    )

    def total(data):
        logits = jax.jit(MODEL.apply_fn)(MODEL.params, None, data.tokens)
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_p[:, :-1], data.tokens[:, 1:, None], -1)[..., 0]
        return (picked * data.mask[:, 1:]).sum(1)

    twin = np.mean(total(EXAMPLES.refusing) - total(EXAMPLES.complying))
    assert found == pytest.approx(twin, abs=1e-3)  # float32 sums of five tokens


def test_a_study_that_watches_the_direction():
    study = tiny.study()
    watched = with_direction(study, EXAMPLES)
    base = study.model.params
    still = watched.evaluate(base, ADAPTER)  # B = 0: the aligned model
    assert still["direction_cosine"] == pytest.approx(1, abs=1e-6)
    assert still["composite"] == study.evaluate(base, ADAPTER)["composite"]
    moved = jax.tree.map(lambda a, s: a + 8.0 * s, ADAPTER, STEPS["inside"][0])
    assert watched.evaluate(base, moved)["direction_cosine"] < 0.999
    assert watched.fingerprint != study.fingerprint
    direction = difference_of_means(
        study.model.apply_fn, base, None, EXAMPLES.refusing, EXAMPLES.harmless
    )
    assert direction.shape == (tiny.CONFIG.layers + 1, tiny.CONFIG.width)

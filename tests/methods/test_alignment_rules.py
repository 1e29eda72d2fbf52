"""Vaccine and Booster: each rule against a slow twin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from alignment_case import (
    ADAPTER,
    BASE,
    HARMFUL,
    KEY,
    PROBLEM,
    SAFE,
    WIDE,
    arrays,
    boosted,
    like,
    loss_of,
    moved,
    toy_gradient,
    toy_loss,
)
from trees import vector

from sbr_jax.methods.vaccine import perturbation, vaccine_gradient

MODEL = tiny.model()
HERE = moved(adapter=WIDE)


@jax.jit
def vaccinated(data, radius):
    problem = dataclasses.replace(PROBLEM, apply_fn=MODEL.apply_fn)
    args = problem, MODEL.params, HERE, data, KEY, radius
    return perturbation(*args), *vaccine_gradient(*args)


@jax.jit
def shifted(adapter, shift):
    return loss_of(
        MODEL.apply_fn, MODEL.params, adapter, arrays(SAFE), attention_shift=shift
    )


@functools.cache
def rule_at(radius):
    return jax.device_get(vaccinated(arrays(SAFE), jnp.float32(radius)))


def slope(function, at, direction, h=1e-2):
    """Central difference: a float32 loss of about 4 leaves an error of 1e-4."""
    up, down = (float(function(at(sign * h * direction))) for sign in (1, -1))
    return (up - down) / (2 * h)


def test_perturbation_has_the_norm_of_its_radius_over_all_layers():
    shift = rule_at(2.0)[0]
    assert shift.shape == (2, 8, tiny.LENGTH, tiny.CONFIG.width)
    np.testing.assert_allclose(np.linalg.norm(shift), 2.0, rtol=1e-5)
    assert (np.linalg.norm(shift.reshape(2, -1), axis=1) > 0.1).all()
    # Nothing is heard from the last answer token on: it predicts no other.
    assert not shift[:, :, -2:].any()
    np.testing.assert_array_equal(rule_at(0.0)[0], 0)


def test_perturbation_is_the_gradient_by_finite_differences():
    shift = rule_at(2.0)[0]

    def along(direction):
        return slope(functools.partial(shifted, HERE), jnp.asarray, direction)

    # Along e the slope is ‖g‖, so every entry of the gradient is e_i ‖g‖ / ρ.
    norm = along(shift / 2.0)
    assert norm > 0.1
    order = np.argsort(-np.abs(shift).ravel())
    for index in (*order[:4], *order[200:1000:200]):
        unit = np.zeros_like(shift)
        unit.ravel()[index] = 1
        wanted = shift.ravel()[index] * norm / 2.0
        assert along(unit) == pytest.approx(wanted, rel=0.03, abs=1e-4)


def test_vaccine_gradient_is_taken_at_the_disturbed_point_held_constant():
    shift, grads, loss = rule_at(2.0)
    assert loss > rule_at(0.0)[2] + 0.01
    assert float(loss) == pytest.approx(float(shifted(HERE, shift)), rel=1e-5)
    rng, flat = np.random.default_rng(0), vector(HERE)
    for _ in range(3):
        direction = rng.normal(size=flat.size)
        direction /= np.linalg.norm(direction)
        found = slope(
            lambda w: shifted(w, shift), lambda d: like(HERE, flat + d), direction
        )
        assert vector(grads) @ direction == pytest.approx(found, rel=0.03, abs=3e-4)


def test_vaccine_without_an_answer_disturbs_nothing():
    data = arrays(SAFE)
    silent = {**data, "mask": jnp.zeros_like(data["mask"])}
    for part in vaccinated(silent, jnp.float32(2.0)):
        np.testing.assert_array_equal(vector(part), 0)


def test_vaccine_gradient_traces_in_bfloat16_with_dropout():
    model = tiny.model(jnp.bfloat16)
    problem = tiny.changed(PROBLEM, apply_fn=model.apply_fn, lora_dropout=0.2)
    rule = functools.partial(vaccine_gradient, problem, radius=2.0)
    args = model.params, WIDE, arrays(SAFE), KEY
    shift = jax.eval_shape(functools.partial(perturbation, problem, radius=2.0), *args)
    assert shift.dtype == jnp.bfloat16
    grads, loss = jax.eval_shape(rule, *args)
    assert loss.dtype == jnp.float32
    for found, wanted in zip(*map(jax.tree.leaves, (grads, WIDE)), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


def test_booster_gradient_equals_its_twin():
    for adapter in (ADAPTER, moved()):
        grads, loss = boosted(adapter, arrays(SAFE), arrays(HARMFUL), 5.0, 0.1)
        f, h = toy_gradient(adapter, SAFE), toy_gradient(adapter, HARMFUL)
        stepped = vector(adapter) - 0.1 * h / np.linalg.norm(h)
        ahead = toy_gradient(like(adapter, stepped), HARMFUL)
        # Five times a difference of gradients of size 1, in float32.
        np.testing.assert_allclose(vector(grads), f + 5 * (h - ahead), atol=2e-5)
        assert np.abs(5 * (h - ahead)).max() > 1e-2
        wanted, _ = toy_loss(BASE, adapter, arrays(SAFE))
        assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_booster_without_a_harmful_gradient_is_the_safe_one():
    """There is no direction, and must be no NaN."""
    adapter, harmful = moved(), arrays(HARMFUL)
    silent = {**harmful, "mask": jnp.zeros_like(harmful["mask"])}
    grads, _ = boosted(adapter, arrays(SAFE), silent, 5.0, 0.1)
    np.testing.assert_allclose(vector(grads), toy_gradient(adapter, SAFE), atol=2e-6)

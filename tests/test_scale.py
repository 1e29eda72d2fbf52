"""Directions do not depend on how large gradients are, to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from subspace_case import normal, plain, rank

from sbr_jax import (
    fisher_subspace,
    from_factors,
    merge,
    project_onto,
    update_projection,
)

TINY = 2.0**-126
# Squares of 2⁻⁶⁶, about 1e-20, are below float32's smallest number.
POWERS = [-100, -66, -30, 60]


def scaled(s, power):
    """What eigenvalues or a trace become: zeros stay, and nothing else becomes one."""
    x = np.asarray(s, np.float64) * 2.0 ** (2 * power)
    return np.where(x > 0, np.maximum(x, TINY), 0)


@pytest.mark.parametrize("energy", [0.7, 1.0])
@pytest.mark.parametrize("power", POWERS)
def test_factors_of_any_scale_give_the_same_directions(power, energy):
    g = normal(0, 6, 24)
    want, got = (
        plain(g, energy=energy),
        plain(g * np.float32(2.0**power), energy=energy),
    )
    np.testing.assert_array_equal(got.basis["w"], want.basis["w"])
    wanted = scaled(want.eigenvalues["w"], power)
    np.testing.assert_array_equal(got.eigenvalues["w"], wanted)
    trace = scaled(want.trace["w"], power)
    np.testing.assert_array_equal(got.trace["w"], np.maximum(trace, 16 * TINY))
    assert rank(got) == (6 if energy == 1.0 else rank(want)) > 0


def linear(params, x, size):
    return size * jnp.vdot(params["w"], x)


@pytest.mark.parametrize("buffer", [64, 8])
@pytest.mark.parametrize("power", [-66, 40])
def test_losses_of_any_scale_give_the_same_directions(power, buffer):
    x = jnp.asarray(normal(1, 20, 12))
    batches = [x[:7], x[7:14], x[14:]]

    def found(size):
        return fisher_subspace(
            linear,
            {"w": jnp.zeros(12)},
            batches,
            max_rank=4,
            buffer_rank=buffer,
            args=(jnp.float32(size),),
        )

    want, got = found(1.0), found(2.0**power)
    assert rank(got) == rank(want) > 0
    np.testing.assert_array_equal(got.basis["w"], want.basis["w"])
    wanted = scaled(want.eigenvalues["w"], power)
    np.testing.assert_array_equal(got.eigenvalues["w"], wanted)


def test_batches_of_very_different_scale_add_up():
    """Neither is lost, in whichever order they come."""
    large, small = jnp.asarray(normal(2, 4, 8)), 1e-25 * jnp.asarray(normal(3, 4, 8))
    params, one = {"w": jnp.zeros(8)}, (jnp.float32(1.0),)
    for batches in ([large, small], [small, large]):
        s = fisher_subspace(linear, params, batches, max_rank=4, args=one)
        trace = np.sum(np.asarray(large, np.float64) ** 2) / 8
        np.testing.assert_allclose(s.trace["w"], trace, rtol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("weighting", ["eigenvalue", "uniform"])
def test_tiny_subspaces_are_merged_and_protect(weighting, keep):
    a, b = (plain(x * np.float32(1e-20)) for x in np.split(normal(4, 4, 16), 2))
    m = merge(
        a, b, max_rank=8, energy=1.0, weighting=weighting, protected=a if keep else None
    )
    assert rank(m) == 4
    params = {"w": jnp.asarray(normal(5, 16))}
    tx = update_projection(m, 1e-2)
    step, _ = tx.update({"w": jnp.asarray(normal(6, 16))}, tx.init(params), params)
    for s in (a, b, m):
        inside = jnp.linalg.norm(project_onto(step, s)["w"])
        assert float(inside) <= 1e-5 * float(jnp.linalg.norm(step["w"]))


def test_nothing_stays_nothing_and_a_dead_layer_does_not_spread():
    rows = np.zeros((3, 2, 5), np.float32)
    rows[:, 0] = 1e-20 * normal(7, 3, 5)
    s = from_factors({"w": jnp.asarray(rows)}, max_rank=4, energy=1.0, layer_axes=1)
    assert np.count_nonzero(s.basis["w"][0].any(axis=0)) == 3
    assert not s.basis["w"][1].any()
    assert s.trace["w"][0] > 0 == s.trace["w"][1]
    assert not s.eigenvalues["w"][1].any()

"""Directions do not depend on how large gradients are, to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from subspace_case import normal, plain, rank

from sbr_jax import (
    energy_share,
    fisher_subspace,
    from_factors,
    merge,
    project_onto,
    project_out,
    update_projection,
)
from sbr_jax.transforms.projection import mix

TINY = 2.0**-126
# Squares of 2⁻⁶⁶, about 1e-20, are below float32's smallest number.
POWERS = [-100, -66, 60]


def scaled(s, power):
    """What eigenvalues or a trace become: zeros stay, and nothing else becomes one."""
    x = np.asarray(s, np.float64) * 2.0 ** (2 * power)
    return np.where(x > 0, np.maximum(x, TINY), 0)


@pytest.mark.parametrize("power", POWERS)
def test_factors_of_any_scale_give_the_same_directions(power):
    g, energy = normal(0, 6, 24), 0.7
    want, got = (plain(x, energy=energy) for x in (g, g * np.float32(2.0**power)))
    np.testing.assert_array_equal(got.basis["w"], want.basis["w"])
    wanted = scaled(want.eigenvalues["w"], power)
    np.testing.assert_array_equal(got.eigenvalues["w"], wanted)
    trace = scaled(want.trace["w"], power)
    np.testing.assert_array_equal(got.trace["w"], np.maximum(trace, 16 * TINY))
    assert rank(got) == rank(want) > 0


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


def half(params, x, size):
    """Of a pair only B has a gradient, as in a fresh adapter."""
    return size * jnp.vdot(params["pair"]["b"], x)


@pytest.mark.parametrize("power", [-100, -66, 40])
def test_zeros_beside_gradients_of_any_scale_change_nothing(power):
    """A leaf without a gradient, and a batch without one."""
    x = jnp.asarray(normal(1, 8, 12))
    batches = [jnp.zeros_like(x), x]
    params = {"pair": {"a": jnp.zeros((3, 2)), "b": jnp.zeros(12)}}

    def found(size):
        args = (jnp.float32(size),)
        s = fisher_subspace(
            half,
            params,
            batches,
            max_rank=4,
            unit=lambda node: isinstance(node, dict) and "a" in node,
            args=args,
        )
        return s, energy_share(half, params, batches, s, args=args)["pair"]

    (want, share), (got, other) = found(1.0), found(2.0**power)
    assert got.basis["pair"].any()
    np.testing.assert_array_equal(got.basis["pair"], want.basis["pair"])
    trace = np.maximum(scaled(want.trace["pair"], power), 4 * TINY)
    np.testing.assert_array_equal(got.trace["pair"], trace)
    assert 0.5 < share == other


def test_batches_of_very_different_scale_add_up():
    """Neither is lost, in whichever order they come."""
    large, small = jnp.asarray(normal(2, 4, 8)), 1e-25 * jnp.asarray(normal(3, 4, 8))
    params, one = {"w": jnp.zeros(8)}, (jnp.float32(1.0),)
    for batches in ([large, small], [small, large]):
        s = fisher_subspace(linear, params, batches, max_rank=4, args=one)
        trace = np.sum(np.asarray(large, np.float64) ** 2) / 8
        np.testing.assert_allclose(s.trace["w"], trace, rtol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "keep"), [("eigenvalue", True), ("uniform", False)]
)
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


INF = float("inf")


@pytest.mark.parametrize(
    ("alpha", "inside", "update", "want"),
    [
        (0.0, 2.0, INF, 2.0),
        (1.0, INF, 2.0, 2.0),
        (0.0, INF, 2.0, INF),
        (1.0, 2.0, INF, INF),
        *[(a, INF, INF, INF) for a in (0.0, 0.3, 1.0)],
        *[(0.5, x, y, INF) for x, y in ((INF, 2.0), (2.0, INF))],
        (0.0, -0.0, -3.0, -0.0),
        (0.25, 4.0, 8.0, 5.0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_has_no_weight_does_not_count(alpha, inside, update, want, dtype):
    x, y = jnp.full((1, 2), inside, dtype), jnp.full((1, 2), update, dtype)
    got = mix(jnp.array([alpha], jnp.float32), x, y)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, jnp.full((1, 2), want, dtype))
    assert np.signbit(got).all() == np.signbit(want)


SIZES = [1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e18, 1.5e19, 1e20, 1e30, 1e38]


@functools.cache
def projecting(metric):
    """One program: α and dtypes are those of the state and the parameters."""
    subspace = plain(normal(8, 3, 24))
    return jax.jit(
        update_projection(subspace, 1e-2, metric=metric, max_norm=None).update
    )


def begun(alpha, params):
    """A state of either metric."""
    tx = update_projection(plain(normal(8, 3, 24)), 1e-2, coefficients=alpha)
    return tx.init(params)


adamw = optax.adamw(1e-2, weight_decay=0.01)
step_of_adamw = jax.jit(adamw.update)


@pytest.mark.parametrize(
    ("alpha", "dtype"), [(0.0, "float32"), (0.3, "bfloat16"), (1.0, "float32")]
)
def test_gradients_of_any_scale_give_the_steps_of_adamw(alpha, dtype):
    """Beyond 1e19 squares are infinite, and AdamW but decays."""
    s = plain(normal(8, 3, 24))
    params = {"w": jnp.asarray(normal(9, 24)).astype(dtype)}
    wide = {"w": params["w"].astype(jnp.float32)}
    update = projecting("euclidean")
    sizes = [*SIZES, np.geomspace(1e-30, 1e38, 24)]  # the last: all of them at once
    for size in sizes:
        rows = np.clip(normal(10, 3, 24), -1, 1) * np.float32(size)
        state, other = begun(alpha, params), adamw.init(wide)
        for row in rows:
            g = {"w": jnp.asarray(row).astype(dtype)}
            with jax.numpy_dtype_promotion("standard"):  # Optax's own need
                want, other = step_of_adamw(
                    {"w": g["w"].astype(jnp.float32)}, other, wide
                )
            got, state = update(g, state, params)
            assert got["w"].dtype == dtype
            assert jnp.isfinite(got["w"]).all(), size
            out = project_out(want, s)["w"]
            want = {"w": (1 - alpha) * out + alpha * want["w"]}
            near = 1e-5 if dtype == "float32" else 1e-2
            close = {"rtol": near, "atol": 1e-7 if dtype == "float32" else 1e-4}
            np.testing.assert_allclose(
                np.asarray(got["w"], np.float32), want["w"], **close, err_msg=str(size)
            )


@pytest.mark.parametrize(
    ("alpha", "share"), [(0.0, -1.0), (0.3, -0.5), (1.0, -1.0), (1.0, 1.0)]
)
@pytest.mark.parametrize("metric", ["adam", "euclidean"])
def test_a_bypass_of_any_scale_keeps_steps_finite(alpha, share, metric):
    params, update = {"w": jnp.asarray(normal(9, 24))}, projecting(metric)
    # Parts that are applied together and leave nothing are each divided by ε = 1e-8.
    nothing = alpha == 1.0 and share == -1.0
    for size in [x for x in SIZES if x <= 1e30 or not nothing]:
        state = begun(alpha, params)
        for row in np.clip(normal(10, 3, 24), -1, 1) * np.float32(size):
            g = {"w": jnp.asarray(row)}
            step, state = update(g, state, params, bypass={"w": share * g["w"]})
            assert jnp.isfinite(step["w"]).all(), size

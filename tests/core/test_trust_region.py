"""The trust region: the nearest point of an ellipsoid, at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from transforms_case import PARAMS, SHAPES, S, adamw, close, space, tree

from sbr_jax import (
    UserError,
    from_factors,
    project_onto,
    replace_subspace,
    trust_region,
)
from sbr_jax.transforms.trust import shrinkage


def divergence(params, s, centre=PARAMS):
    """q of all units and layers together, in float64."""
    total = 0.0
    for k in s.basis:
        pairs = zip(s.basis[k], s.eigenvalues[k], params[k], centre[k], strict=True)
        for basis, values, theta, start in pairs:
            moved = (reference.f64(theta) - reference.f64(start)).ravel()
            c = reference.f64(basis).T @ moved
            total += 0.5 * np.sum(reference.f64(values) * c**2)
    return total


# --- the root -------------------------------------------------------------------------

CASES, SIZE = 60, 64
compiled = jax.jit(shrinkage)
each = jax.jit(jax.vmap(shrinkage))
DECADES = (0, 6, 24)


@pytest.mark.parametrize("decades", DECADES)
def test_factors_are_those_of_bisection(decades):
    """Random spectra with zeros, coordinates and budgets, over many decades."""
    rng = np.random.default_rng(decades)
    shape = (CASES, SIZE)
    values = 10.0 ** (rng.uniform(-decades, 0, shape) + rng.uniform(-6, 6, (CASES, 1)))
    values[rng.random(shape) < 0.2] = 0
    c = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, (CASES, 1))
    values, c = values.astype(np.float32), c.astype(np.float32)
    whole = 0.5 * np.sum(reference.f64(values) * reference.f64(c) ** 2, axis=1)
    epsilon = (whole * 10.0 ** rng.uniform(-8, 0.5, CASES)).astype(np.float32)
    got = reference.f64(each(c, values, epsilon))
    active = 0
    for x, lam, eps, before, factor in zip(c, values, epsilon, whole, got, strict=True):
        want = reference.ellipsoid_factors(x, lam, float(eps))
        np.testing.assert_allclose(factor, want, atol=1e-6)
        after = 0.5 * np.sum(reference.f64(lam) * (factor * x) ** 2)
        assert abs(after / min(float(eps), before) - 1) <= 1e-6
        active += before > eps
    assert 0 < active < CASES


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_a_spectrum_of_any_scale_and_of_steep_steps(scale):
    """Geometric spectra are Newton's hardest; and nothing at all is left alone."""
    values = jnp.asarray(np.geomspace(1.0, 1e-7, SIZE) * scale, jnp.float32)
    c = jnp.asarray(np.geomspace(1.0, 1e7, SIZE), jnp.float32)
    whole = 0.5 * np.sum(reference.f64(values) * reference.f64(c) ** 2)
    for share in (0.5, 1e-3, 1e-6):
        epsilon = jnp.float32(min(share * whole, 1e38))
        if not jnp.isfinite(epsilon) or epsilon < 1e-36:
            continue
        factor = reference.f64(compiled(c, values, epsilon))
        after = 0.5 * np.sum(reference.f64(values) * (factor * reference.f64(c)) ** 2)
        assert abs(after / float(epsilon) - 1) <= 1e-6
        want = reference.ellipsoid_factors(c, values, float(epsilon))
        np.testing.assert_allclose(factor, want, atol=1e-5)
    nothing, some = jnp.zeros(SIZE), jnp.ones(SIZE)
    for pair in ((nothing, some), (some, nothing)):
        np.testing.assert_array_equal(compiled(*pair, jnp.float32(1e-5)), 1.0)


# --- the transformation ---------------------------------------------------------------


def test_it_is_the_nearest_point_with_one_budget_for_all_layers():
    update, epsilon = tree(30, 0.3), 0.05
    tx = trust_region(S, epsilon)
    start = tx.init(PARAMS)
    params = jax.tree.map(lambda x, y: x + 0.1 * y, PARAMS, tree(40))
    got, state = tx.update(update, start, params)
    ends = {
        k: reference.f64(params[k])
        + reference.f64(update[k])
        - reference.f64(PARAMS[k])
        for k in SHAPES
    }
    places = [(k, layer) for k in SHAPES for layer in range(3)]
    found = [
        reference.f64(S.basis[k][layer]).T @ ends[k][layer].ravel()
        for k, layer in places
    ]
    values = [reference.f64(S.eigenvalues[k][layer]) for k, layer in places]
    factors = reference.ellipsoid_factors(
        np.concatenate(found), np.concatenate(values), epsilon
    )
    for (k, layer), c, factor in zip(
        places, found, np.split(factors, len(places)), strict=True
    ):
        change = reference.f64(S.basis[k][layer]) @ ((factor - 1) * c)
        want = reference.f64(update[k][layer]).ravel() + change
        np.testing.assert_allclose(np.ravel(got[k][layer]), want, atol=2e-6)
    assert len({round(float(f[0]), 3) for f in np.split(factors, len(places))}) > 1
    jax.tree.map(np.testing.assert_array_equal, state, start)


EPSILON = 1e-3


def chained(epsilon=EPSILON, s=S):
    return optax.chain(adamw(1e-2, weight_decay=0.1), trust_region(s, epsilon))


def apart(*parts):
    """A chain of transformations, each a program of its own.

    In one program a product of the one and a sum of the other may round together.
    """
    alone = (
        optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))
        for tx in parts
    )
    return optax.chain(*alone)


ARRANGEMENTS = {
    "chain": chained,
    "part masked": lambda: optax.chain(
        optax.masked(chained(), {"v": True, "w": False}),
        optax.masked(optax.set_to_zero(), {"v": False, "w": True}),
    ),
}


def steps(tx, count, params=PARAMS, swap=None, compiled=jax.jit):
    """Parameters after each step with gradients that keep pulling the same way."""
    update, state, seen = compiled(tx.update), tx.init(params), []
    for i in range(count):
        if i == swap:
            state = replace_subspace(state, space(11))
        grads = jax.tree.map(lambda x, y: x + 0.3 * y, tree(50), tree(60 + 7 * i))
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        with jax.numpy_dtype_promotion("standard"):
            step, state = update(grads, state, params)
        params = optax.apply_updates(params, step)
        seen.append(params)
    return seen


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_step_keeps_the_budget_and_it_is_used(arrangement):
    seen = steps(ARRANGEMENTS[arrangement](), 24, swap=17)
    found = [divergence(p, S if i < 17 else space(11)) for i, p in enumerate(seen)]
    assert max(found) <= EPSILON * (1 + 1e-3)
    assert found[15] >= 0.99 * EPSILON
    assert found[-1] >= 0.99 * EPSILON
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), seen[15], PARAMS)
    assert moved["v"] > 0.05  # outside it goes on


def test_a_large_budget_changes_nothing_and_a_small_one_is_a_projection():
    def bounded(epsilon, count):
        parts = apart(adamw(1e-2, weight_decay=0.1), trust_region(S, epsilon))
        return steps(parts, count, compiled=lambda update: update)

    free = steps(
        apart(adamw(1e-2, weight_decay=0.1)), 6, compiled=lambda update: update
    )
    close(bounded(1e6, 6), free, rtol=0, atol=0)
    strict = bounded(1e-12, 6)[-1]
    moved, plain = (jax.tree.map(jnp.subtract, x, PARAMS) for x in (strict, free[-1]))
    inside, before = (optax.tree.norm(project_onto(x, S)) for x in (moved, plain))
    assert float(inside) <= 1e-4 * float(before)
    # Within the budget motion is free, to the bit.
    close(bounded(2 * divergence(free[2], S), 3), free[:3], rtol=0, atol=0)


def test_bfloat16_parameters_round_past_the_budget_and_updates_keep_it():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    found = [divergence(p, S, half) for p in steps(chained(), 16, half)]
    # Rounding by 2⁻⁹ of parameters near 1, with λ up to 62: 2.4 ε was seen.
    assert EPSILON * (1 + 1e-3) < max(found) <= 4 * EPSILON
    # With float32 updates, as of float32 masters, the bound is that of float32.
    tx = trust_region(S, EPSILON)
    update = tree(70, 0.5)
    kept, _ = tx.update(update, tx.init(half), half)
    ends = jax.tree.map(lambda x, y: x.astype(jnp.float32) + y, half, kept)
    assert divergence(ends, S, half) <= EPSILON * (1 + 1e-3)


def test_the_budget_may_change_and_the_centre_may_be_given():
    tx = optax.inject_hyperparams(trust_region)(S, epsilon=EPSILON)
    state = tx.init(PARAMS)
    update = tree(70, 0.5)
    for epsilon in (EPSILON, 0.5 * EPSILON):
        state.hyperparams["epsilon"] = jnp.float32(epsilon)
        kept, state = tx.update(update, state, PARAMS)
        ends = optax.apply_updates(PARAMS, kept)
        np.testing.assert_allclose(divergence(ends, S), epsilon, rtol=1e-3)
    plain = trust_region(S, EPSILON)
    other = tree(80)
    kept, _ = plain.update(update, plain.init(PARAMS), PARAMS, centre=other)
    ends = optax.apply_updates(PARAMS, kept)
    np.testing.assert_allclose(divergence(ends, S, other), EPSILON, rtol=1e-3)


@pytest.mark.parametrize("what", ["centre", "params"])
def test_trees_that_do_not_fit_are_refused(what):
    tx = trust_region(S, EPSILON)
    given = {"params": PARAMS, what: {"v": PARAMS["v"]}}
    with pytest.raises(UserError, match=rf"expected {what}.*missing: \[\"\['w'\]\"\]"):
        tx.update(tree(1), tx.init(PARAMS), **given)


def test_after_adam_the_boundary_may_hold_what_the_gradient_would_not():
    """What its page says: the nearest point is not the nearest in Adam's metric."""
    s = from_factors({"w": jnp.array([[1.0, 1.0]])}, max_rank=1)
    tx = optax.chain(optax.scale_by_adam(), optax.scale(-1e-2), trust_region(s, 1e-4))
    params, g = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}
    state, update = tx.init(params), jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(50):
            step, state = update(g, state, params)
            params = optax.apply_updates(params, step)
    # c = −√(2 ε / λ) along (1, 1)/√2, λ = 2, and nothing along (1, −1).
    np.testing.assert_allclose(params["w"], -0.01 / 2**0.5, rtol=1e-4)

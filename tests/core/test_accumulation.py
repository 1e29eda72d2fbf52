"""Micro-steps with a bypass: all of them count, or it is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms_case import PARAMS, S, close, space, tree

from sbr_jax import (
    UserError,
    add_bypass,
    gradient_projection,
    multi_steps,
    read_subspace,
    replace_subspace,
    update_projection,
)

RECIPES = {
    "add": lambda: add_bypass(),
    "gradient": lambda: gradient_projection(S, optax.sgd(0.1)),
    "adam": lambda: update_projection(S, 1e-2, max_norm=None, weight_decay=0.1),
    "euclidean": lambda: update_projection(
        S, 1e-2, metric="euclidean", max_norm=None, weight_decay=0.1
    ),
}
every = pytest.mark.parametrize("recipe", RECIPES)


@functools.cache
def made(recipe, parts=1):
    """A recipe in so many micro-steps, its update compiled."""
    inner = RECIPES[recipe]()
    tx = multi_steps(inner, parts) if parts > 1 else inner
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


GRADS = [tree(900 + 7 * i) for i in range(6)]
# Large in the first micro-steps and opposite in the last.
BYPASSES = [tree(950 + 7 * i, (3.0, 2.0, -1.0)[i % 3]) for i in range(6)]


def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def run(tx, grads, bypasses):
    state, steps = tx.init(PARAMS), []
    for g, b in zip(grads, bypasses, strict=True):
        step, state = tx.update(g, state, PARAMS, bypass=b)
        steps.append(step)
    return steps, state


@every
def test_micro_steps_are_one_step_of_the_means(recipe):
    steps, _ = run(made(recipe, 3), GRADS, BYPASSES)
    want, _ = run(
        made(recipe),
        [mean(GRADS[:3]), mean(GRADS[3:])],
        [mean(BYPASSES[:3]), mean(BYPASSES[3:])],
    )
    close(steps[2], want[0])
    close(steps[5], want[1])
    for i in (0, 1, 3, 4):
        assert not any(x.any() for x in jax.tree.leaves(steps[i]))
    last, _ = run(made(recipe), [mean(GRADS[:3])], BYPASSES[2:3])
    gap = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), steps[2], last[0])
    assert max(jax.tree.leaves(gap)) > 1e-3  # what optax.MultiSteps alone would do


@every
def test_optax_alone_is_refused_with_a_bypass_and_works_without(recipe):
    tx = optax.MultiSteps(RECIPES[recipe](), 3)
    given = GRADS[0], tx.init(PARAMS), PARAMS
    with jax.numpy_dtype_promotion("standard"):
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(UserError, match=r"MultiSteps.*multi_steps"):
                update(*given, bypass=BYPASSES[0])
        tx.update(*given)


@every
def test_a_missing_bypass_counts_as_zeros(recipe):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    a, b = (
        run(made(recipe, 3), GRADS[:3], [*BYPASSES[:2], last])[0]
        for last in (None, zero)
    )
    close(a[2], b[2])


def test_it_traces_once_initialises_abstractly_and_takes_a_new_subspace():
    tx, count = multi_steps(RECIPES["adam"](), lambda step: 2), {"n": 0}

    @jax.jit
    def update(g, state, params, bypass):
        count["n"] += 1
        return tx.update(g, state, params, bypass=bypass)

    counting = optax.GradientTransformationExtraArgs(tx.init, update)
    _, state = run(counting, GRADS[:3], BYPASSES[:3])
    other = space(11)
    state = replace_subspace(state, other, 0.5)
    np.testing.assert_array_equal(read_subspace(state).basis["w"], other.basis["w"])
    update(GRADS[3], state, PARAMS, bypass=BYPASSES[3])
    assert count["n"] == 1
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)


def test_sums_where_they_are_asked_for():
    tx = multi_steps(add_bypass(), 2, use_grad_mean=False)
    steps, _ = run(tx, GRADS[:2], BYPASSES[:2])
    want = jax.tree.map(lambda *x: sum(x), *GRADS[:2], *BYPASSES[:2])
    close(steps[1], want)


def test_whether_to_skip_is_asked_about_the_sum_of_both():
    """A gradient that the bypass takes back is not large; one that it spoils is."""
    large = functools.partial(optax.skip_large_updates, max_squared_norm=1.0)
    tx = multi_steps(add_bypass(), 1, should_skip_update_fn=large)
    back = jax.tree.map(lambda g: 0.01 - g, GRADS[0])
    (step,), _ = run(tx, GRADS[:1], [back])
    close(step, jax.tree.map(lambda g: jnp.full_like(g, 0.01), GRADS[0]))
    finite = multi_steps(add_bypass(), 1, should_skip_update_fn=optax.skip_not_finite)
    spoilt = jax.tree.map(lambda g: g * jnp.nan, GRADS[0])
    (step,), _ = run(finite, GRADS[:1], [spoilt])
    assert not any(x.any() for x in jax.tree.leaves(step))


def test_masked_and_chained_it_is_still_the_mean():
    mask = {"v": True, "w": False}
    inner = multi_steps(add_bypass(), 2)
    tx = optax.chain(optax.scale(1.0), optax.masked(inner, mask))
    state = tx.init(PARAMS)
    for g, b in zip(GRADS[:2], BYPASSES[:2], strict=True):
        step, state = tx.update(g, state, PARAMS, bypass=b)
    want = mean(GRADS[:2])["v"] + mean(BYPASSES[:2])["v"]
    np.testing.assert_allclose(step["v"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(step["w"], GRADS[1]["w"])

"""The task part's share inside a subspace, against AdamW in float64 by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from sbr_jax import from_factors, gradient_projection, multi_steps, update_projection
from sbr_jax.transforms.shares import adamw_gradient_projection, read_task_share

RATE, DECAY, B1, B2, EPS = 0.03, 0.1, 0.9, 0.999, 1e-8
SIZE, STEPS = 10, 5


def case(seed=0, anchored=True):
    """Subspace, parameters, and gradients of task and bypass for every step."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(3, SIZE)).astype(np.float32)
    subspace = from_factors({"w": jnp.asarray(factors)}, max_rank=3, energy=1.0)
    v = reference.f64(subspace.basis["w"])
    g = 3.0 * rng.normal(size=(STEPS, SIZE))
    # The bypass pulls mostly inside: the whole step says little about the task.
    b = 5.0 * rng.normal(size=(STEPS, 3)) @ v.T + 0.1 * rng.normal(size=(STEPS, SIZE))
    return subspace, v, rng.normal(size=SIZE), g, b * anchored


def twin(kind, alpha, seed, anchored):
    """Share of the task's part, and of the step, at every step, in float64."""
    _, v, theta, gradients, bypasses = case(seed, anchored)
    inside, outside = v @ v.T, np.eye(SIZE) - (1 - alpha) * v @ v.T
    m_g, m_b, v_sum, v_both, nu = (np.zeros(SIZE) for _ in range(5))
    shares = []
    for t, (g, b) in enumerate(zip(gradients, bypasses, strict=True), 1):
        before = outside @ g if kind == "gradient" else g
        factor = min(1.0, 1.0 / np.linalg.norm(before + b))
        g, b = factor * before, factor * b
        m_g, m_b = B1 * m_g + (1 - B1) * g, B1 * m_b + (1 - B1) * b
        v_sum = B2 * v_sum + (1 - B2) * (g + b) ** 2
        v_both = B2 * v_both + (1 - B2) * (g**2 + b**2)
        nu = v_sum if kind == "gradient" else alpha * v_sum + (1 - alpha) * v_both
        scale = np.sqrt(nu / (1 - B2**t)) + EPS
        task = m_g / (1 - B1**t) / scale + DECAY * theta
        passed = m_b / (1 - B1**t) / scale
        if kind == "update":
            task = outside @ task
        step = -RATE * (task + passed)
        shares.append(
            [np.linalg.norm(inside @ x) / np.linalg.norm(x) for x in (task, step)]
        )
        theta = theta + step
    return np.array(shares)


def optimizer(kind, subspace, alpha):
    more = {"coefficients": alpha, "weight_decay": DECAY}
    if kind == "gradient":
        return adamw_gradient_projection(subspace, RATE, **more)
    metric = "adam" if kind == "metric" else "euclidean"
    return update_projection(subspace, RATE, metric=metric, task_share=True, **more)


def told_by(state):
    share = read_task_share(state)
    assert share is not None
    return float(share)


@functools.cache
def compiled(kind):
    """One program: subspace and α are those of the state."""
    return jax.jit(optimizer(kind, case()[0], 0.0).update)


def walk(kind, alpha, seed=0, anchored=True):
    """What the optimizer tells, and the whole step's share, at every step."""
    subspace, v, theta, gradients, bypasses = case(seed, anchored)
    params = {"w": jnp.asarray(theta, jnp.float32)}
    state, told = optimizer(kind, subspace, alpha).init(params), []
    update = compiled(kind)
    for g, b in zip(gradients, bypasses, strict=True):
        grads, pull = ({"w": jnp.asarray(x, jnp.float32)} for x in (g, b))
        extra = {"bypass": pull} if anchored else {}
        step, state = update(grads, state, params, **extra)
        params = optax.apply_updates(params, step)
        u = reference.f64(step["w"])
        share = np.linalg.norm(v.T @ u) / np.linalg.norm(u)
        told.append([told_by(state), share])
    return np.array(told)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_the_share_is_that_of_the_tasks_part_by_hand(kind, alpha, anchored):
    wanted = twin(kind, alpha, 3, anchored)
    found = walk(kind, alpha, 3, anchored)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    if not anchored:  # The step is the task's alone.
        np.testing.assert_allclose(found[:, 0], found[:, 1], atol=1e-6)
    else:  # The whole step's says mostly what the bypass did.
        assert np.mean(found[:, 1] - found[:, 0]) > 0.1


@pytest.mark.parametrize("kind", ["update", "metric"])
def test_a_strict_projection_of_the_step_leaves_nothing_of_the_task_inside(kind):
    strict = walk(kind, 0.0)
    assert strict[:, 0].max() < 1e-6
    assert strict[:, 1].min() > 0.3
    # Relaxed, what is inside grows with α; before Adam it leaks even at α = 0.
    shares = [walk(kind, alpha)[:, 0].mean() for alpha in (0.0, 0.3, 0.9)]
    assert shares[0] < shares[1] < shares[2]
    assert walk("gradient", 0.0)[:, 0].min() > 0.05


def test_projecting_before_adamw_is_the_recipe_to_the_bit():
    subspace, _, theta, gradients, bypasses = case(5)
    params = {"w": jnp.asarray(theta, jnp.float32)}
    ours = adamw_gradient_projection(subspace, RATE, weight_decay=DECAY)
    theirs = gradient_projection(subspace, optax.adamw(RATE, weight_decay=DECAY))
    states = [ours.init(params), theirs.init(params)]
    for g, b in zip(gradients, bypasses, strict=True):
        grads, pull = ({"w": jnp.asarray(x, jnp.float32)} for x in (g, b))
        steps = []
        for i, tx in enumerate((ours, theirs)):
            with jax.numpy_dtype_promotion("standard"):  # Optax's own need
                step, states[i] = tx.update(grads, states[i], params, bypass=pull)
            steps.append(np.asarray(jax.tree.leaves(step)[0]))
        np.testing.assert_array_equal(*steps)
    # The share costs nothing where it is not asked for.
    plain = update_projection(subspace, RATE).init(params)
    assert read_task_share(plain) is None
    assert read_task_share(optax.adam(0.1).init(params)) is None


@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_micro_steps_tell_the_share_of_the_averaged_step(kind):
    subspace, _, theta, gradients, bypasses = case(2)
    params = {"w": jnp.asarray(theta, jnp.float32)}
    single = optimizer(kind, subspace, 0.0)
    several = multi_steps(optimizer(kind, subspace, 0.0), 2)
    grads, pulls = (
        [{"w": jnp.asarray(x, jnp.float32)} for x in y[:2]]
        for y in (gradients, bypasses)
    )
    mean = [jax.tree.map(lambda x, y: (x + y) / 2, *pair) for pair in (grads, pulls)]
    _, wanted = single.update(mean[0], single.init(params), params, bypass=mean[1])
    state = several.init(params)
    for g, b in zip(grads, pulls, strict=True):
        _, state = several.update(g, state, params, bypass=b)
    np.testing.assert_allclose(told_by(state), told_by(wanted), atol=1e-6)

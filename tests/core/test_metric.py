"""The projection in Adam's metric: outside, downhill, and on to the optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from subspace_case import normal, plain
from transforms_case import PARAMS, SHAPES, S, space, tree

from sbr_jax import (
    from_factors,
    multi_steps,
    project_onto,
    project_out,
    replace_subspace,
    update_projection,
)

METRICS = pytest.mark.parametrize("metric", ["adam", "euclidean"])


# --- the projection alone -------------------------------------------------------------

SIZE, RANK = 48, 4
PRECONDITIONERS = {
    "one": np.ones(SIZE),
    "a first step": 1 / np.abs(normal(20, SIZE)),
    "3 decades": np.geomspace(1e-3, 1.0, SIZE),
    "30 decades": np.geomspace(1e-30, 1.0, SIZE),
    "huge": np.geomspace(1e30, 1e37, SIZE),
    "half of it dead": np.arange(SIZE) % 2.0,
    "one free coordinate": np.where(np.arange(SIZE) == 3, 1.0, 1e-4),
}


@pytest.fixture(scope="module")
def projected():
    subspace = plain(normal(21, RANK, SIZE), max_rank=RANK + 2)  # two columns unused

    @jax.jit
    def both(u, c):
        return project_out({"w": u}, subspace, {"w": c})["w"]

    return subspace, both


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_the_nearest_point_outside_is_the_dense_one_and_goes_downhill(name, projected):
    subspace, both = projected
    basis = reference.columns(subspace.basis["w"])
    scale = jnp.asarray(PRECONDITIONERS[name], jnp.float32)
    for seed in range(30, 33):
        gradient = normal(seed, SIZE)
        step = reference.f64(scale * gradient)
        out = reference.f64(both(jnp.asarray(step, jnp.float32), scale))
        size = np.linalg.norm(out)
        assert np.linalg.norm(basis.T @ out) <= 1e-7 * size
        assert size <= np.linalg.norm(step) * (1 + 1e-6)
        cosine = gradient @ out / np.linalg.norm(gradient) / size
        assert cosine > (0 if name == "one free coordinate" else 1e-3)
        if name not in ("half of it dead", "30 decades"):  # beyond the twin itself
            own = reference.f64(scale) / float(scale.max())
            want = reference.nearest_outside(step, basis @ basis.T, own)
            np.testing.assert_allclose(out, want, atol=1e-5 * size)


def test_a_preconditioner_that_is_constant_or_zero_is_euclidean(projected):
    subspace, both = projected
    u = normal(22, SIZE)
    want = project_out({"w": jnp.asarray(u)}, subspace)["w"]
    for scale in (0.0, 1e-30, 1.0, 1e30):
        got = both(jnp.asarray(u), jnp.full(SIZE, scale, jnp.float32))
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_what_lies_in_the_subspace_gives_no_step(projected):
    subspace, both = projected
    scale = jnp.asarray(PRECONDITIONERS["3 decades"], jnp.float32)
    inside = project_onto({"w": jnp.asarray(normal(23, SIZE))}, subspace)["w"]
    out = both(scale * inside, scale)
    assert jnp.linalg.norm(out) <= 1e-5 * jnp.linalg.norm(scale * inside)
    # The Euclidean projection of the same step goes on, and not downhill for sure.
    other = project_out({"w": scale * inside}, subspace)["w"]
    assert jnp.linalg.norm(other) >= 0.1 * jnp.linalg.norm(scale * inside)


# --- the guarantee --------------------------------------------------------------------


def masked(tx):
    return optax.masked(tx, {"v": True, "w": True})


ARRANGEMENTS = {
    "alone": lambda tx: tx,
    "masked": masked,
    "multi_steps": lambda tx: multi_steps(masked(tx), 2),
}


CASES = [
    *((arrangement, "adam") for arrangement in ARRANGEMENTS),
    ("alone", "euclidean"),
]


@pytest.mark.parametrize(("arrangement", "metric"), CASES)
def test_no_step_has_a_part_inside(arrangement, metric):
    """AdamW with decay, and another subspace on the way."""
    tx = ARRANGEMENTS[arrangement](
        update_projection(S, 1e-2, metric=metric, weight_decay=0.1)
    )
    params, state, taken = PARAMS, tx.init(PARAMS), 0
    update = jax.jit(tx.update)
    for i in range(8):
        held = S if i < 4 else space(11)
        if i == 4:
            state = replace_subspace(state, held)
        with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps' own need
            step, state = update(tree(100 + 7 * i), state, params)
        params = optax.apply_updates(params, step)
        for k in SHAPES:
            for layer in range(3):
                flat = reference.f64(step[k][layer]).ravel()
                inside = reference.columns(held.basis[k][layer]).T @ flat
                assert np.linalg.norm(inside) <= 1e-7 * np.linalg.norm(flat)
                taken += bool(flat.any())
    assert taken >= 4 * 6  # every step, or every second


def test_a_coordinate_without_gradient_is_not_sent_far():
    """It would be the cheapest of all: Adam divides it by ε alone."""
    rows = np.ones((1, 8))
    rows[0, 1] = 1e-3
    s = from_factors({"w": jnp.asarray(rows, jnp.float32)}, max_rank=1)
    params = {"w": jnp.zeros(8)}
    tx = update_projection(s, 1e-2, weight_decay=0.0, max_norm=None)
    g = {"w": jnp.asarray(normal(24, 8)).at[1].set(0.0)}
    step, _ = jax.jit(tx.update)(g, tx.init(params), params)
    assert abs(float(step["w"][1])) <= 1e-2
    assert float(jnp.vdot(g["w"], step["w"])) < -1e-3


# --- the property ---------------------------------------------------------------------


@METRICS
def test_a_constant_gradient_across_the_subspace(metric):
    """U = (1, 1)/√2 and g = (1, 2): Adam's step of g lies in U, g does not."""
    s = from_factors({"w": jnp.array([[1.0, 1.0]])}, max_rank=1)
    tx = update_projection(s, 1e-2, metric=metric, weight_decay=0.0)
    g = {"w": jnp.array([1.0, 2.0])}

    def one(carry, _):
        step, state = tx.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], step), state), None

    start = {"w": jnp.zeros(2)}
    (found, _), _ = jax.lax.scan(one, (start, tx.init(start)), length=1000)
    assert abs(float(found["w"].sum())) <= 1e-5
    if metric == "euclidean":
        assert float(jnp.abs(found["w"]).max()) <= 1e-5
    else:
        assert float(found["w"][1]) < -3.0  # −η/3 a step


def spd(rng, size, condition=10.0):
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return (q * np.geomspace(1 / condition, 1, size)) @ q.T


SEEDS, WIDTH, STEPS = 4, 24, 3000


@pytest.fixture(scope="module")
def quadratics():
    """L = ½ θᵀHθ − hᵀθ, an anchor ½ (θ − a)ᵀB(θ − a) and U, for each seed."""
    made = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        h_matrix, h = spd(rng, WIDTH), rng.standard_normal(WIDTH)
        anchor, middle = 0.3 * spd(rng, WIDTH), rng.standard_normal(WIDTH)
        rows = rng.standard_normal((1, 4, WIDTH)).astype(np.float32)
        made.append((h_matrix, h, anchor, middle, rows[0]))
    subspace = from_factors(
        {"w": jnp.stack([jnp.asarray(m[4]) for m in made], 1)},
        max_rank=4,
        energy=1.0,
        layer_axes=1,
    )
    return made, subspace


@pytest.mark.parametrize(
    ("metric", "anchored"), [("adam", False), ("adam", True), ("euclidean", True)]
)
def test_it_rests_at_the_constrained_optimum(metric, anchored, quadratics):
    """At P ∇L + ∇anchor = 0 also with noise on one coordinate; Euclidean ones do not.

    Layers of one unit hold the seeds, so that one program serves them all.
    """
    made, subspace = quadratics
    matrix, h, anchor, middle = (
        jnp.asarray(np.stack([m[i] for m in made]), jnp.float32) for i in range(4)
    )

    def rate(count):
        return 0.025 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / STEPS))

    tx = update_projection(
        subspace, rate, metric=metric, weight_decay=0.0, max_norm=None
    )

    def times(a, x):
        return jnp.einsum("lij,lj->li", a, x, precision="highest")

    def one(noise, carry, key):
        theta, state = carry
        kick = noise * jax.random.normal(key, (SEEDS,))
        grad = (times(matrix, theta["w"]) - h).at[:, 0].add(kick)
        pull = {"w": times(anchor, theta["w"] - middle)} if anchored else None
        step, state = tx.update({"w": grad}, state, theta, bypass=pull)
        return (optax.apply_updates(theta, step), state), None

    @jax.jit
    def run(noise):
        keys = jax.random.split(jax.random.key(0), STEPS)
        start = {"w": jnp.zeros((SEEDS, WIDTH))}
        step = functools.partial(one, noise)
        return jax.lax.scan(step, (start, tx.init(start)), keys)[0][0]["w"]

    for noise in (0.0, 3.0):
        errors = []
        for (a, b, c, m, _), basis, theta in zip(
            made, subspace.basis["w"], reference.f64(run(noise)), strict=True
        ):
            inside = reference.projector(basis)
            out = np.eye(WIDTH) - inside
            if anchored:
                want = np.linalg.solve(out @ a + c, out @ b + c @ m)
            else:
                want = np.linalg.solve(out @ a + inside, out @ b)
                assert np.linalg.norm(inside @ theta) <= 1e-5 * np.linalg.norm(theta)
            errors.append(np.linalg.norm(theta - want) / np.linalg.norm(want))
        if metric == "euclidean":
            assert min(errors) >= 0.1
        else:  # what is left is the noise of a finite run
            assert max(errors) <= (0.05 if noise else 1e-4)

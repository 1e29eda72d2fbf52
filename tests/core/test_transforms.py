"""Relaxed projection and its recipes, against dense projectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from transforms_case import PARAMS, SHAPES, S, adamw, close, projecting, tree

from sbr_jax import (
    UserError,
    empty_subspace,
    fisher_relaxation,
    gradient_projection,
    project_onto,
    project_onto_complement,
    relaxed,
    replace_subspace,
    update_projection,
)


def norm(x):
    return float(optax.tree.norm(x))


def leak(step, s=S):
    """Share of the step's length inside the subspace."""
    return norm(project_onto(step, s)) / norm(step)


def run(tx, grads, bypasses=None, update=None):
    """Steps taken with each gradient in turn; parameters move along."""
    params, state, steps = PARAMS, tx.init(PARAMS), []
    update = update or jax.jit(tx.update)
    for i, g in enumerate(grads):
        extra = {} if bypasses is None else {"bypass": bypasses[i]}
        step, state = update(g, state, params, **extra)
        params = optax.apply_updates(params, step)
        steps.append(step)
    return steps, state


# --- relaxed projection (the oracles of the published method) -----------------------


def test_projection_is_the_dense_projector_for_every_layer():
    tx = project_onto_complement(S)
    u = tree(20)
    out, _ = tx.update(u, tx.init(PARAMS))
    for k in SHAPES:
        for layer in range(3):
            flat = reference.f64(u[k][layer]).reshape(-1)
            want = flat - reference.projector(S.basis[k][layer]) @ flat
            np.testing.assert_allclose(  # float32 rounding of entries up to 4
                np.asarray(out[k][layer]).reshape(-1), want, atol=3e-6
            )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_relaxation_scales_the_safety_component(alpha):
    tx = relaxed(project_onto_complement(S), alpha)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    u, v = tree(30), tree(40)
    out, _ = update(u, state)
    close(project_onto(out, S), jax.tree.map(lambda x: alpha * x, project_onto(u, S)))
    assert norm(out) <= norm(u) * (1 + 1e-6)
    if alpha == 1.0:
        jax.tree.map(np.testing.assert_array_equal, out, u)
    both, _ = update(jax.tree.map(lambda x, y: 2.0 * x - y, u, v), state)
    apart = jax.tree.map(lambda x, y: 2.0 * x - y, out, update(v, state)[0])
    close(both, apart)  # linear


def test_coefficients_may_differ_by_unit_and_layer():
    alpha = {"v": 1.0, "w": jnp.array([0.0, 0.5, 1.0])}
    tx = relaxed(project_onto_complement(S), alpha)
    u = tree(50)
    out, _ = tx.update(u, tx.init(PARAMS))
    np.testing.assert_array_equal(out["v"], u["v"])
    inside_in, inside_out = project_onto(u, S)["w"], project_onto(out, S)["w"]
    for layer, a in enumerate((0.0, 0.5, 1.0)):
        np.testing.assert_allclose(inside_out[layer], a * inside_in[layer], atol=3e-6)


def test_relaxed_wraps_anything():
    tx = relaxed(optax.scale(3.0), 0.5)
    assert tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0].tolist() == [2.0, 2.0]
    tx = relaxed(optax.scale(3.0), {"v": 0.0, "w": 1.0})
    out, _ = tx.update({"v": jnp.ones(2), "w": jnp.ones(2)}, tx.init(PARAMS))
    assert (out["v"].tolist(), out["w"].tolist()) == ([3.0, 3.0], [1.0, 1.0])


def test_fisher_relaxation_follows_the_traces():
    traces = {k: np.asarray(v) for k, v in S.trace.items()}
    mean = np.mean(np.concatenate(list(traces.values())))
    sizes = {"v": 20, "w": 40}
    for name, scale in (
        ("none", dict.fromkeys(sizes, 1.0)),
        ("mean", dict.fromkeys(sizes, mean)),
        ("parameter", sizes),
    ):
        got = fisher_relaxation(S, 0.3, name)
        for k in SHAPES:
            want = np.clip(1 - 0.3 * traces[k] / scale[k], 0, 1)
            np.testing.assert_allclose(got[k], want, atol=1e-6)
    zero = empty_subspace(PARAMS, max_rank=4, layer_axes=1)
    for name in ("none", "mean", "parameter"):  # no Fisher: no constraint, no NaN
        assert all(
            bool((a == 1).all()) for a in fisher_relaxation(zero, 1e9, name).values()
        )
    # The published strict ablation: λ = 1e9.
    assert not any(a.any() for a in fisher_relaxation(S, 1e9).values())
    with pytest.raises(UserError, match="'mean', 'kind' or 'parameter', got 'max'"):
        fisher_relaxation(S, 0.5, "max")
    with pytest.raises(UserError, match="strictness"):
        fisher_relaxation(S, -1.0)


# --- recipes -------------------------------------------------------------------------


def test_what_enters_the_optimizer_has_no_safety_component():
    tx = gradient_projection(S, optax.identity(), max_norm=0.5)
    steps, _ = run(tx, [tree(60, 10.0)])
    assert leak(steps[0]) <= 1e-6
    assert abs(norm(steps[0]) - 0.5) < 1e-5  # clipped after the projection


def test_bypass_passes_the_projection_and_is_clipped_with_the_rest():
    tx = gradient_projection(S, optax.identity(), max_norm=None)
    g, b = tree(70), project_onto(tree(80), S)
    step = run(tx, [g], [b])[0][0]
    close(project_onto(step, S), b, atol=3e-6)
    clipped = run(gradient_projection(S, optax.identity()), [g], [b])[0][0]
    assert abs(norm(clipped) - 1.0) < 1e-5


def test_gradient_projection_before_adam_leaks():
    """Why update projection exists: the same run, measured both ways."""
    grads = [tree(100 + 7 * i) for i in range(10)]
    before, _ = run(gradient_projection(S, adamw(1e-2, weight_decay=0.01)), grads)
    after, _ = run(update_projection(S, 1e-2), grads, update=projecting())
    # Adam rescales coordinates, which turns vectors back towards the subspace.
    assert all(leak(step) >= 1e-2 for step in before)
    # The documented guarantee.
    assert all(leak(step) <= 1e-5 for step in after)


def test_update_projection_without_bypass_is_a_plain_chain():
    rate = optax.linear_schedule(1e-2, 1e-3, 5)
    alpha = {"v": 0.2, "w": 0.7}
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        adamw(rate, weight_decay=0.1),
        relaxed(project_onto_complement(S), alpha),
    )
    ours = update_projection(
        S, rate, metric="euclidean", weight_decay=0.1, coefficients=alpha
    )
    grads = [tree(200 + 7 * i, 10.0 ** (i % 3 - 1)) for i in range(6)]
    want, got = run(plain, grads)[0], run(ours, grads)[0]
    close(want, got, rtol=1e-4, atol=1e-7)  # steps of 1e-2: float32 rounding


METRICS = pytest.mark.parametrize("metric", ["adam", "euclidean"])
UNCLIPPED = {"max_norm": None, "weight_decay": 0.1}
EMPTY = empty_subspace(PARAMS, max_rank=4, layer_axes=1)


@METRICS
@pytest.mark.parametrize(
    ("subspace", "alpha"),
    [*((S, alpha) for alpha in (0.0, 0.3, 1.0)), (EMPTY, 0.0)],
    ids=["strict", "relaxed", "free", "of rank 0"],
)
def test_update_projection_is_its_dense_twin(subspace, alpha, metric):
    grads = [tree(600 + 7 * i) for i in range(6)]
    # Half of each bypass undoes the task: where the second moment matters most.
    bypasses = [
        jax.tree.map(lambda g, r: -g + 0.3 * r, g, tree(700 + 7 * i))
        for i, g in enumerate(grads)
    ]
    settings = {"metric": metric, **UNCLIPPED}
    tx = update_projection(subspace, 1e-2, coefficients=alpha, **settings)
    got = run(tx, grads, bypasses, projecting(**settings))[0]
    for k in SHAPES:
        for layer in range(3):
            want = reference.update_projection(
                [
                    (np.ravel(g[k][layer]), np.ravel(b[k][layer]))
                    for g, b in zip(grads, bypasses, strict=True)
                ],
                reference.projector(subspace.basis[k][layer]),
                alpha,
                np.ravel(PARAMS[k][layer]),
                1e-2,
                decay=0.1,
                metric=metric,
            )
            for step, twin in zip(got, want, strict=True):
                # Steps of 1e-2 in float32.
                np.testing.assert_allclose(
                    np.ravel(step[k][layer]), twin, rtol=1e-3, atol=1e-7
                )


BARE = {"max_norm": None, "weight_decay": 0.0}


@pytest.mark.parametrize("left", [0.0, 1e-6, 1e-3])
def test_a_bypass_that_cancels_the_task_does_not_blow_up_the_step(left):
    """One second moment of g + b divides each part by what is left of both."""
    grads = [tree(800)] * 20
    bypasses = [jax.tree.map(lambda g: (left - 1.0) * g, g) for g in grads]
    steps = run(update_projection(S, 1e-2), grads, bypasses, projecting(**BARE))[0]
    for step in steps:
        # Two parts of at most 1e-2 a coordinate; a projection keeps lengths in bounds.
        size = sum(x.size for x in jax.tree.leaves(step))
        assert norm(step) <= 2 * 1e-2 * size**0.5 * (1 + 1e-5)
        assert norm(step) > 1e-3  # projected, they no longer cancel


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (0.998, 0.7), (None, 0.0)])
def test_steps_stay_in_bounds_right_after_the_projection_changed(before, after):
    """α counts when a moment is used, not when it was gathered."""
    grads = tree(800)
    bypass = jax.tree.map(lambda g: -g, grads)
    start = EMPTY if before is None else S
    tx = update_projection(start, 1e-2, coefficients=before)
    state, update = tx.init(PARAMS), projecting(**BARE)
    for _ in range(100):
        _, state = update(grads, state, PARAMS, bypass=bypass)
    state = replace_subspace(state, S, after)
    step, _ = update(grads, state, PARAMS, bypass=bypass)
    size = sum(x.size for x in jax.tree.leaves(step))
    assert norm(step) <= 2 * 1e-2 * size**0.5 * (1 + 1e-5)
    assert norm(step) > 1e-4


def test_update_projection_needs_params():
    tx = update_projection(S, 1e-2)
    with pytest.raises(UserError, match="expected params"):
        tx.update(tree(0), tx.init(PARAMS))


def test_bfloat16_parameters_keep_their_dtype():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    step, state = projecting()(half, update_projection(S, 1e-2).init(half), half)
    assert {x.dtype.name for x in jax.tree.leaves(step)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves((state.together, state.apart))} == {
        "float32"
    }
    # bfloat16 has 8 bits: rounding after the projection leaks about 2⁻⁹.
    as_float = jax.tree.map(lambda x: x.astype(jnp.float32), step)
    assert leak(as_float) < 5e-3

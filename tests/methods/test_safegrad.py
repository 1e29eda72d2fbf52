"""SafeGrad against slow twins, and what it must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from continual_case import (
    BASE,
    FRESH,
    KEY,
    MEDICAL,
    MOVED,
    PLAIN,
    PROBLEM,
    SAFE,
    TASK,
    by_halves,
    hook,
    logits_of,
    plain_gradient,
    run,
)
from trees import vector

from sbr_jax.methods._anchor import anchor_loss
from sbr_jax.methods.base import draw_rows
from sbr_jax.methods.safegrad import resolve_conflict, safegrad
from sbr_jax.models import answers


def slow_resolve(u, a):
    product = u @ a
    return u - product / (a @ a) * a if product < 0 else u


def test_conflict_is_removed_over_all_parameters_as_one_vector():
    rng, conflicts = np.random.default_rng(0), 0
    resolve = jax.jit(resolve_conflict)
    for scale in (1.0, 1e-4, 1e3) * 7:
        u = {"x": rng.normal(size=(2, 3)), "y": rng.normal(size=4)}
        a = {"x": scale * rng.normal(size=(2, 3)), "y": scale * rng.normal(size=4)}
        u, a = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (u, a))
        kept, found = resolve(u, a)
        before, after, other = vector(u), vector(kept), vector(a)
        size = np.linalg.norm(before) * np.linalg.norm(other)
        np.testing.assert_allclose(after, slow_resolve(before, other), atol=1e-5)
        np.testing.assert_allclose(found["cosine"], before @ other / size, atol=1e-5)
        assert after @ other >= -1e-6 * size  # §6, up to float32 rounding.
        assert float(found["conflict"]) == (before @ other < 0)
        if before @ other >= 0:
            np.testing.assert_array_equal(before, after)
        conflicts += int(before @ other < 0)
    assert 3 < conflicts < 18
    # Aligned in one leaf, opposed in all: the whole vector decides.
    u, a = {"x": jnp.ones(1), "y": -3 * jnp.ones(1)}, {"x": jnp.ones(1)}
    kept, _ = resolve(u, {**a, "y": jnp.ones(1)})
    np.testing.assert_allclose(vector(kept), [2, -2], atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8])
def test_no_direction_removes_nothing(size):
    u = {"x": jnp.array([1.0, -2.0])}
    kept, found = jax.jit(resolve_conflict)(u, {"x": jnp.array([-size, 0.0])})
    np.testing.assert_array_equal(vector(kept), vector(u))
    assert float(found["conflict"]) == float(found["cosine"]) == 0
    kept, found = resolve_conflict({"x": jnp.zeros(2)}, u)
    assert not vector(kept).any()
    assert float(found["cosine"]) == 0


def slow_divergence(adapter, tokens, mask, temperature):
    def log_p(adapter):
        z = np.asarray(logits_of(BASE, adapter, tokens), np.float64) / temperature
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    reference, model = log_p(None), log_p(adapter)
    gaps = (np.exp(reference) * (reference - model)).sum(-1)
    return np.mean([g[:-1] @ m[1:] / m[1:].sum() for g, m in zip(gaps, mask)])  # noqa: B905


def alignment_loss(adapter, safe, temperature):
    held = {**safe, "reference": answers.states(PROBLEM.apply_fn, BASE, None, safe)}
    return anchor_loss(PROBLEM.apply_fn, BASE, adapter, held, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_alignment_loss_is_the_divergence_from_the_model_without_adapter(temperature):
    value = jax.jit(jax.value_and_grad(lambda a: alignment_loss(a, SAFE, temperature)))
    loss, grads = value(MOVED)
    twin = slow_divergence(MOVED, **SAFE, temperature=temperature)
    np.testing.assert_allclose(loss, twin, rtol=1e-4)
    assert twin > 1e-2
    # Along the gradient itself, by central differences of the twin.
    way = 1e-2 / np.linalg.norm(vector(grads))
    ahead, behind = (
        slow_divergence(
            jax.tree.map(lambda x, g, s=s: x + s * way * g, MOVED, grads),
            **SAFE,
            temperature=temperature,
        )
        for s in (1, -1)
    )
    slope = (ahead - behind) / 2e-2
    np.testing.assert_allclose(slope, np.linalg.norm(vector(grads)), rtol=1e-2)
    # At θ₀ the divergence is at its minimum.
    loss, grads = value(FRESH)
    assert abs(float(loss)) < 1e-6
    assert np.linalg.norm(vector(grads)) < 1e-5


def test_safegrad_gradient_is_the_resolved_one_plus_the_weighted_alignment():
    method = safegrad(kl_weight=0.5, temperature=2.0, kl_batch_size=4)
    gradient = hook(method)
    state = method.init(PROBLEM, BASE, FRESH, KEY)
    alignment_gradient = jax.jit(jax.grad(lambda a, safe: alignment_loss(a, safe, 2.0)))
    learned, _ = run(PLAIN, {}, FRESH, MEDICAL, 8)
    seen = set()
    for adapter in (learned, MOVED):
        for index in range(3):
            key = jax.random.key(index)
            grads, extra, metrics = gradient(adapter, state, TASK, key)
            safe = draw_rows(
                PROBLEM, state["safe"], TASK, jax.random.fold_in(key, 1), 4
            )
            assert safe["tokens"].shape[0] == 4
            a = vector(alignment_gradient(adapter, safe))
            u = vector(plain_gradient(adapter, BASE, TASK)[1])
            wanted = slow_resolve(u, a) + 0.5 * a
            np.testing.assert_allclose(vector(grads), wanted, rtol=1e-3, atol=1e-5)
            assert extra == {}
            assert float(metrics["conflict"]) == (u @ a < 0)
            seen.add(float(metrics["conflict"]))
    assert 1.0 in seen
    # Microbatches share the step's safety examples; each is tested for itself.
    metrics = gradient(MOVED, state, TASK, KEY)[2]
    means = by_halves(method, MOVED, state)[2]
    np.testing.assert_allclose(means["alignment"], metrics["alignment"], rtol=1e-4)
    assert means["conflict"] in (0, 0.5, 1)
    grads, _, metrics = gradient(FRESH, state, TASK, KEY)
    assert float(metrics["conflict"]) == 0
    np.testing.assert_allclose(
        vector(grads), vector(plain_gradient(FRESH, BASE, TASK)[1]), atol=1e-5
    )

"""Contrastive directions and shares of held-out energy, against dense definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from subspace_case import gram_error, normal, plain, rank

from sbr_jax import contrast, energy_share, fisher_subspace, from_factors

P = 24


def dense_contrast(a, b, energy, regulariser):
    """Projector of the directions, and eigenvalues of F_a in it; rows a, b [N, P]."""
    fa, fb = (reference.f64(x).T @ reference.f64(x) for x in (a, b))
    count = np.linalg.matrix_rank(fb)
    metric = fb + regulariser * np.trace(fb) / max(count, 1) * np.eye(len(fb))
    if not fb.any():
        metric = np.eye(len(fb))
    values, vectors = np.linalg.eigh(metric)
    half = vectors / np.sqrt(values)
    mu, u = np.linalg.eigh(half.T @ fa @ half)
    directions = (half @ u)[:, ::-1][:, mu[::-1] > 1e-9 * mu.max()]
    q, _ = np.linalg.qr(directions)
    held = np.cumsum(np.diag(q.T @ fa @ q))
    k = int(np.sum(held < (energy - 1e-6) * np.trace(fa))) + 1
    q = q[:, : min(k, q.shape[1])]
    return q @ q.T, reference.eigen(q.T @ fa @ q)[0]


def padded(rows):
    """40 rows of whatever number, so that all cases share their programs."""
    return np.pad(rows, ((0, 40 - len(rows)), (0, 0)))


def rows_of(kind):
    """Rows of what is held and of what is left alone."""
    a, b = normal(0, 9, P), normal(1, 7, P)
    shared = 3 * normal(2, 2, P)
    a, b = np.concatenate([a, shared]), np.concatenate([b, 2 * shared])
    found = {
        "apart": (normal(0, 5, P), normal(1, 4, P)),
        "sharing": (a, b),
        "the same": (a, a),
        "more rows than parameters": (normal(3, 40, P), normal(4, 30, P)),
        "no other": (a, 0 * a),
        "large": (1e4 * a, 1e-3 * b),
    }[kind]
    return tuple(map(padded, found))


@pytest.mark.parametrize(("energy", "regulariser"), [(0.6, 1.0), (0.95, 0.01)])
@pytest.mark.parametrize(
    "kind",
    ["apart", "sharing", "the same", "more rows than parameters", "no other", "large"],
)
def test_contrast_is_the_dense_generalised_eigenproblem(kind, energy, regulariser):
    a, b = rows_of(kind)
    found = contrast(
        plain(a, max_rank=P),
        plain(b, max_rank=P),
        max_rank=P,
        energy=energy,
        regulariser=regulariser,
    )
    wanted, values = dense_contrast(a, b, energy, regulariser)
    assert rank(found) == len(values)
    assert gram_error(found.basis["w"]) <= 2e-6
    np.testing.assert_allclose(
        reference.projector(found.basis["w"]), wanted, atol=2e-3 * regulariser**-0.5
    )
    np.testing.assert_allclose(
        found.eigenvalues["w"][: len(values)], values, atol=1e-3 * values[0]
    )
    assert np.all(np.diff(found.eigenvalues["w"]) <= 0)
    np.testing.assert_allclose(
        found.trace["w"], np.sum(reference.f64(a) ** 2), rtol=1e-5
    )


def test_what_both_need_is_left_alone_and_a_large_regulariser_lets_it_back():
    a, b = rows_of("sharing")
    sharp, blunt = (
        contrast(plain(a, max_rank=P), plain(b, max_rank=P), max_rank=4, regulariser=r)
        for r in (1e-2, 1e6)
    )
    shared = from_factors({"w": jnp.asarray(a[9:11])}, max_rank=2, energy=1.0)
    inside = [np.sum((s.basis["w"].T @ shared.basis["w"]) ** 2) for s in (sharp, blunt)]
    assert inside[0] < 0.1 < 1.5 < inside[1]
    leading = reference.projector(plain(a, max_rank=4).basis["w"])
    np.testing.assert_allclose(
        reference.projector(blunt.basis["w"]), leading, atol=1e-3
    )


def test_contrast_is_taken_layer_by_layer_and_keeps_a_rank_of_zero():
    rows, other = (normal(5 + i, 6, 2, 4, 3) for i in range(2))
    rows[:, 1] = 0
    a, b = (
        from_factors({"w": jnp.asarray(x)}, max_rank=12, energy=1.0, layer_axes=1)
        for x in (rows, other)
    )
    found = contrast(a, b, max_rank=6, energy=0.8, regulariser=0.1)
    assert rank(found)[1] == 0
    wanted, _ = dense_contrast(
        rows[:, 0].reshape(6, -1), other[:, 0].reshape(6, -1), 0.8, 0.1
    )
    np.testing.assert_allclose(
        reference.projector(found.basis["w"][0]), wanted, atol=1e-3
    )


# --- shares ---------------------------------------------------------------------------


def product(params, x):
    return jnp.tanh(jnp.vdot(params["w"], x)) + jnp.sum(params["v"] * x[:4])


def test_energy_share_is_that_of_dense_projections():
    params = {"v": jnp.ones(4), "w": jnp.asarray(normal(10, P))}
    data = [jnp.asarray(normal(11 + i, n, P)) for i, n in enumerate((5, 3))]
    found = fisher_subspace(product, params, data[:1], max_rank=3, energy=0.7)
    shares, own = (energy_share(product, params, x, found) for x in (data, data[:1]))
    grad = jax.jit(jax.grad(product))
    grads = [grad(params, x) for batch in data for x in batch]
    again = energy_share(product, params, data, found, microbatch=2)
    for name in params:
        inside = [reference.projector(found.basis[name]) @ g[name] for g in grads]
        whole = sum(float(jnp.sum(g[name] ** 2)) for g in grads)
        wanted = sum(float(np.sum(x**2)) for x in inside) / whole
        assert 0 < wanted < 1
        np.testing.assert_allclose(shares[name], wanted, rtol=1e-5)
        np.testing.assert_allclose(again[name], wanted, rtol=1e-5)
        # Of its own examples it holds what it was made to hold.
        held = jnp.sum(found.eigenvalues[name]) / found.trace[name]
        np.testing.assert_allclose(own[name], held, rtol=1e-5)
        assert 0.7 <= float(own[name]) <= 1

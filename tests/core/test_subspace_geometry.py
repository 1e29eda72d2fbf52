"""Merging subspaces, angles between them, and controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from programs_case import compiled
from subspace_case import gram_error, normal, plain, rank

from sbr_jax import (
    discarded_energy,
    empty_subspace,
    from_factors,
    merge,
    overlap,
    principal_angles,
    random_subspace,
    shuffled_subspace,
)


def span(vectors, max_rank=16):
    return plain(np.linalg.qr(np.asarray(vectors).T)[0].T, max_rank)


def padded(rows, count):
    """With zeros below: another number of rows is no other program."""
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))


def coordinates(size, *places, max_rank=32):
    rows = np.eye(size, dtype=np.float32)[list(places)]
    return plain(padded(rows, 8), max_rank)


# --- merge -------------------------------------------------------------------------


def test_eigenvalue_merge_is_the_eigendecomposition_of_the_sum():
    ga, gb = normal(14, 4, 25), 0.3 * normal(15, 6, 25)
    m = merge(plain(ga), plain(gb), max_rank=16, energy=1.0)
    dense = sum(reference.f64(g).T @ reference.f64(g) for g in (ga, gb))
    values, vectors = reference.eigen(dense)
    np.testing.assert_allclose(
        m.eigenvalues["w"][:10], values[:10], atol=4e-6 * values[0]
    )
    v = vectors[:, :10]
    np.testing.assert_allclose(reference.projector(m.basis["w"]), v @ v.T, atol=1e-5)
    np.testing.assert_allclose(m.trace["w"], values.sum(), rtol=1e-6)
    assert gram_error(m.basis["w"]) <= 1e-6


def test_uniform_merge_is_the_published_svd():
    a, b = span(normal(19, 3, 30)), span(normal(20, 5, 30))
    m = merge(a, b, max_rank=16, energy=0.9, weighting="uniform")
    u, squares = reference.uniform_merge(a.basis["w"], b.basis["w"], 0.9)
    assert rank(m) == u.shape[1]
    np.testing.assert_allclose(reference.projector(m.basis["w"]), u @ u.T, atol=1e-5)
    cos = np.cos(reference.angles(a.basis["w"], b.basis["w"]))
    expected = np.sort(np.concatenate([1 + cos, 1 - cos, [1.0, 1.0]]))[::-1]
    np.testing.assert_allclose(squares, expected, atol=1e-6)
    np.testing.assert_allclose(
        m.eigenvalues["w"][: rank(m)], squares[: rank(m)], atol=2e-6
    )
    assert float(m.trace["w"]) == float(b.trace["w"])  # the new one's


def test_published_facts_about_the_uniform_merge():
    uniform = {"max_rank": 32, "weighting": "uniform"}
    same = coordinates(40, *range(5))
    m = merge(same, same, **uniform)
    assert rank(m) == 5
    np.testing.assert_allclose(m.eigenvalues["w"][:5], 2.0, atol=1e-5)

    def apart(p, q):
        return merge(
            coordinates(40, *range(p)), coordinates(40, *range(20, 20 + q)), **uniform
        )

    assert rank(apart(1, 1)) == 2
    assert rank(apart(8, 8)) == 15
    assert rank(apart(3, 5)) == 8


def test_protected_columns_are_never_dropped():
    base = coordinates(40, 0, 1, max_rank=4)
    big = plain(100 * np.eye(40, dtype=np.float32)[5:13], max_rank=4)
    without = merge(base, big, max_rank=4)
    assert float(discarded_energy(base, without)["w"]) > 0.99
    kept = merge(base, big, max_rank=4, protected=base)
    np.testing.assert_array_equal(kept.basis["w"][:, :2], base.basis["w"][:, :2])
    assert rank(kept) == 4
    assert gram_error(kept.basis["w"]) <= 1e-6
    np.testing.assert_allclose(kept.eigenvalues["w"][:2], 1.0, atol=1e-6)
    # Nothing but the protected span: nothing is added, and noise is not kept.
    assert rank(merge(base, base, max_rank=4, energy=1.0, protected=base)) == 2
    tilted = span(normal(21, 2, 40), max_rank=4)
    again = merge(tilted, tilted, max_rank=4, energy=1.0, protected=tilted)
    assert rank(again) == 2


def test_merge_under_jit_and_over_layers():
    a, b = normal(22, 4, 3, 12), normal(23, 4, 3, 12)

    def make(x):
        return from_factors({"w": jnp.asarray(x)}, max_rank=8, energy=1.0, layer_axes=1)

    m = jax.jit(lambda x, y: merge(x, y, max_rank=6))(make(a), make(b))
    for layer in range(3):
        alone = merge(plain(a[:, layer], 8), plain(b[:, layer], 8), max_rank=6)
        np.testing.assert_allclose(
            m.eigenvalues["w"][layer], alone.eigenvalues["w"], rtol=1e-5, atol=1e-6
        )


# --- geometry ----------------------------------------------------------------------


def test_principal_angles_of_any_size_and_rank():
    a, b = span(normal(24, 4, 30), 6), span(normal(25, 2, 30), 5)
    want = reference.angles(a.basis["w"], b.basis["w"])
    for x, y in ((a, b), (b, a)):
        got = np.asarray(principal_angles(x, y)["w"])
        np.testing.assert_allclose(got[:2], want, atol=2e-6)
        assert got.shape == (5,)
        assert not got[2:].any()


@pytest.mark.parametrize("angle", [0.0, 1e-5, 1e-4, 1e-2, 1.0, np.pi / 2])
def test_small_angles_are_not_lost(angle):
    eye = np.eye(9)
    b = np.stack([np.cos(angle) * eye[0] + np.sin(angle) * eye[4], eye[1]])
    theta = principal_angles(span(eye[:2]), span(b.astype(np.float32)))["w"]
    # The arc cosine alone could not tell anything below 3e-4 from zero.
    np.testing.assert_allclose(theta[:2], sorted([0.0, angle]), atol=1e-6)


def test_overlap_and_discarded_energy():
    a, b = span(normal(26, 4, 30)), span(normal(27, 2, 30))
    cos = np.cos(reference.angles(a.basis["w"], b.basis["w"]))
    np.testing.assert_allclose(overlap(a, b)["w"], np.mean(cos**2), atol=2e-6)
    np.testing.assert_allclose(
        discarded_energy(b, a)["w"], 1 - np.mean(cos**2), atol=2e-6
    )
    zero = empty_subspace({"w": jnp.zeros(30)}, max_rank=16)
    assert float(overlap(a, zero)["w"]) == 0.0
    assert float(discarded_energy(zero, a)["w"]) == 0.0


def test_control_subspaces_keep_the_size_and_lose_the_meaning():
    rows = np.repeat(normal(28, 4, 1, 400), 2, axis=1)
    rows[:, 1] *= 2  # two layers
    s = from_factors({"w": jnp.asarray(rows)}, max_rank=6, energy=1.0, layer_axes=1)
    for control in (random_subspace, shuffled_subspace):
        c = control(jax.random.key(0), s)
        assert rank(c) == rank(s) == [4, 4]
        np.testing.assert_array_equal(c.eigenvalues["w"], s.eigenvalues["w"])
        for layer in range(2):
            assert gram_error(c.basis["w"][layer]) <= 1e-6
        # Two random 4-dimensional subspaces of 400: mean squared cosine 4/400.
        assert float(overlap(s, c)["w"].max()) < 0.1
        assert bool(jnp.any(c.basis["w"][0] != c.basis["w"][1]))
        with compiled() as again:
            control(jax.random.key(1), s)
        assert again == []
    c = shuffled_subspace(jax.random.key(0), s)
    np.testing.assert_array_equal(
        np.sort(c.basis["w"], axis=1), np.sort(s.basis["w"], axis=1)
    )


def test_random_subspace_is_uniform():
    like = coordinates(6, 0, 1, max_rank=2)
    keys = jax.random.split(jax.random.key(2), 2000)
    bases = jax.vmap(lambda k: random_subspace(k, like).basis["w"])(keys)
    mean = jnp.mean(bases @ jnp.swapaxes(bases, 1, 2), axis=0)
    # E Π = (k/P) I; the standard error over 2000 draws is below 0.006.
    np.testing.assert_allclose(mean, np.eye(6) / 3, atol=0.03)


@pytest.mark.parametrize("weighting", ["eigenvalue", "uniform"])
@pytest.mark.parametrize("seed", range(2))
def test_merging_nearly_equal_low_rank_bases_stays_orthonormal(seed, weighting):
    # Far more columns than rank: most candidate columns are rounding inside the span.
    rng = np.random.default_rng(seed)
    rank, size = int(rng.integers(1, 20)), 1024
    scale = 10.0 ** -rng.uniform(0, 6, size=(rank, 1))
    old = rng.normal(size=(rank, size)) * scale
    old[:, : size // 2] *= seed % 2
    new = rng.normal(size=(rank, rank)) @ old
    a, b = (
        from_factors({"w": jnp.asarray(padded(x, 20), jnp.float32)}, max_rank=64)
        for x in (old, new)
    )
    merged = merge(a, b, max_rank=64, weighting=weighting)
    basis = np.asarray(merged.basis["w"], np.float64)
    basis = basis[:, np.any(basis != 0, axis=0)]
    assert basis.shape[1] >= 1
    # float32 rounding of inner products of length 1024.
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=2e-6)
    # The share of the old basis that is lost is a share.
    lost = float(discarded_energy(a, merged)["w"])
    assert -1e-6 <= lost <= 1 + 1e-6

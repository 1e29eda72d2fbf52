"""Subspaces: factors, projection and the record, against dense definitions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from subspace_case import gram_error, normal, plain, rank

from sbr_jax import (
    UserError,
    effective_rank,
    empty_subspace,
    from_factors,
    merge,
    principal_angles,
    project_onto,
    project_out,
    random_subspace,
)
from sbr_jax.subspace.factors import unit_eigenpairs

# --- factors ---------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(6, 20), (20, 6), (1, 5), (4, 1)])
def test_gram_route_is_the_dense_eigendecomposition(rows, size):
    g = normal(0, rows, size)
    s = plain(g)
    values, vectors = reference.eigen(reference.f64(g).T @ reference.f64(g))
    k = min(rows, size)
    # float32 eigenvalues: a few ε of the largest one.
    np.testing.assert_allclose(
        s.eigenvalues["w"][:k], values[:k], atol=2e-6 * values[0]
    )
    top = vectors[:, : rank(s)]
    np.testing.assert_allclose(
        reference.projector(s.basis["w"]), top @ top.T, atol=5e-6
    )
    np.testing.assert_allclose(s.trace["w"], values.sum(), rtol=1e-6)


@pytest.mark.parametrize("decades", [0, 4, 12, 20])
def test_columns_are_orthonormal_however_eigenvalues_are_scaled(decades):
    g = normal(1, 24, 300) * np.logspace(0, -decades / 2, 24)[:, None]
    v = plain(g.astype(np.float32), max_rank=24)
    assert gram_error(v.basis["w"]) <= 1e-6  # the documented guarantee
    assert np.all(np.diff(v.eigenvalues["w"]) <= 0)
    assert rank(v) == 24 if decades <= 4 else 8 <= rank(v) <= 24


def test_small_directions_beside_a_large_one_survive():
    # 1e-6 of the largest eigenvalue: a Gram matrix alone would lose it in float32.
    g = np.diag([1.0, 1e-3, 1e-3]).astype(np.float32) @ normal(3, 3, 40)
    values, _ = reference.eigen(reference.f64(g).T @ reference.f64(g))
    np.testing.assert_allclose(plain(g).eigenvalues["w"][:3], values[:3], rtol=1e-3)


def test_other_energies_compile_nothing():
    rows = normal(3, 9, 14)
    plain(rows, energy=0.5)
    program: Any = unit_eigenpairs
    before = program._cache_size()
    ranks = [rank(plain(rows, energy=energy)) for energy in (0.3, 0.8, 0.95, 1.0)]
    assert ranks == sorted(set(ranks))
    assert ranks[-1] == 9
    assert program._cache_size() == before


def test_rank_rule():
    assert rank(plain(np.ones((7, 3), np.float32), energy=0.9)) == 1
    for n in (1, 5, 9, 10, 11, 16):  # smallest integer of at least 0.9 n
        eye = np.pad(np.eye(n, dtype=np.float32), (0, 16 - n))
        assert rank(plain(eye, energy=0.9)) == -(-9 * n // 10)
    g = normal(4, 12, 40)
    values, _ = reference.eigen(reference.f64(g).T @ reference.f64(g))
    assert rank(plain(g, energy=0.7)) == reference.published_rank(values, 0.7)
    assert rank(plain(g, max_rank=3, energy=0.7)) == 3


def test_nothing_gives_rank_zero_and_constrains_nothing():
    s = plain(np.zeros((4, 9), np.float32), energy=0.9)
    assert rank(s) == 0  # the published code would keep one arbitrary column
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(s))
    u = {"w": jnp.asarray(normal(5, 9))}
    np.testing.assert_array_equal(project_out(u, s)["w"], u["w"])
    assert not project_onto(u, s)["w"].any()
    assert rank(merge(s, s, max_rank=4)) == 0
    assert rank(merge(s, s, max_rank=4, weighting="uniform")) == 0
    b = plain(normal(6, 2, 9))
    assert rank(merge(s, b, max_rank=4, energy=1.0)) == 2


def test_joint_unit_and_layers_equal_one_dense_problem_per_layer():
    params = {"q": {"b": normal(7, 5, 3, 2, 4), "a": normal(8, 5, 3, 4, 2)}}

    def is_pair(x):
        return isinstance(x, dict) and "a" in x

    s = from_factors(
        jax.tree.map(jnp.asarray, params),
        max_rank=8,
        energy=1.0,
        unit=is_pair,
        layer_axes=1,
    )
    assert s.basis["q"].shape == (3, 16, 8)
    for layer in range(3):
        # pytree order: "a" comes before "b" in a dict.
        pair = [params["q"][k][:, layer].reshape(5, -1) for k in ("a", "b")]
        alone = plain(np.concatenate(pair, axis=1), max_rank=8)
        np.testing.assert_allclose(
            reference.projector(s.basis["q"][layer]),
            reference.projector(alone.basis["w"]),
            atol=2e-6,
        )
    u = jax.tree.map(lambda x: jnp.asarray(x[0]), params)
    out = project_out(u, s)
    assert jax.tree.structure(out) == jax.tree.structure(u)
    flat = np.concatenate([u["q"][k][1].reshape(-1) for k in ("a", "b")])
    want = flat - reference.projector(s.basis["q"][1]) @ flat
    got = np.concatenate([out["q"][k][1].reshape(-1) for k in ("a", "b")])
    np.testing.assert_allclose(got, want, atol=2e-6)


# --- projection --------------------------------------------------------------------


def test_projection_is_dense_projection_and_keeps_dtype():
    s = plain(normal(9, 4, 30))
    u = normal(10, 30)
    pi = reference.projector(s.basis["w"])
    np.testing.assert_allclose(
        project_onto({"w": jnp.asarray(u)}, s)["w"], pi @ u, atol=2e-6
    )
    half = project_out({"w": jnp.asarray(u, jnp.bfloat16)}, s)["w"]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(  # bfloat16 rounding of values up to 4: 2⁻⁷
        half.astype(jnp.float32), u - pi @ u, atol=3e-2
    )


def test_projecting_out_is_accurate_where_little_remains():
    s = plain(normal(11, 4, 200))
    v = reference.columns(s.basis["w"])
    outside = normal(12, 200) - v @ (v.T @ normal(12, 200))
    u = (v @ normal(13, 4) * 1e3 + outside * 1e-1).astype(np.float32)
    out = reference.f64(project_out({"w": jnp.asarray(u)}, s)["w"])
    assert np.linalg.norm(v.T @ out) <= 1e-6 * np.linalg.norm(out)


# --- the record ----------------------------------------------------------------------


def test_subspace_is_a_pytree_and_shapes_never_change():
    s = plain(normal(30, 3, 10), max_rank=5)
    leaves, treedef = jax.tree.flatten(s)
    assert [x.shape for x in leaves] == [(10, 5), (5,), ()]
    assert treedef.unflatten(leaves).fingerprint == s.fingerprint
    assert hash(treedef) == hash(jax.tree.structure(plain(normal(31, 1, 10), 5)))
    shapes = jax.eval_shape(lambda: empty_subspace({"w": jnp.zeros(10)}, max_rank=5))
    assert jax.tree.structure(shapes) == treedef
    assert rank(plain(normal(32, 4, 2), max_rank=7)) == 2  # K above P


def test_units_can_be_left_out():
    rows = {"v": jnp.asarray(normal(33, 3, 8)), "w": jnp.asarray(normal(34, 3, 8))}
    s = from_factors(rows, max_rank=4)
    part = dataclasses.replace(
        s,
        basis=s.basis | {"v": None},
        eigenvalues=s.eigenvalues | {"v": None},
        trace=s.trace | {"v": None},
    )
    u = {k: x[0] for k, x in rows.items()}
    out = project_out(u, part)
    np.testing.assert_array_equal(out["v"], u["v"])
    assert float(jnp.linalg.norm(out["w"])) < float(jnp.linalg.norm(u["w"]))
    assert not project_onto(u, part)["v"].any()
    m = merge(part, part, max_rank=4)
    assert m.basis["v"] is None
    assert merge(part, s, max_rank=4).basis["v"] is not None
    assert principal_angles(part, s)["v"] is None
    assert effective_rank(part)["v"] is None
    assert random_subspace(jax.random.key(0), part).basis["v"] is None


def test_a_cap_below_the_protected_rank_is_refused():
    s = from_factors({"w": jnp.eye(6)[:3]}, max_rank=4, energy=1.0)
    with pytest.raises(UserError, match="max_rank of at least 3"):
        merge(s, s, max_rank=2, protected=s)

"""Decompositions: a CPU gets one matrix at a time, whatever asks for them."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs_case import compiled
from transforms_case import PARAMS, S, tree

from sbr_jax import (
    contrast,
    from_factors,
    merge,
    principal_angles,
    project_out,
    update_projection,
)
from sbr_jax.subspace import decompositions

MATRICES = jax.random.normal(jax.random.key(0), (3, 6, 6))
MATRICES = jnp.einsum("lij,lkj->lik", MATRICES, MATRICES) + jnp.eye(6)[None]
TWINS = {
    "cholesky": np.linalg.cholesky,
    "eigh": np.linalg.eigh,
    "svd": lambda x: np.linalg.svd(x, full_matrices=False),
    "singular_values": lambda x: np.linalg.svd(x, compute_uv=False),
    "triangle": lambda x: np.linalg.qr(x, mode="r"),
}
OTHER = from_factors(
    {k: jax.random.normal(jax.random.key(1), (4, *p.shape)) for k, p in PARAMS.items()},
    max_rank=4,
    layer_axes=1,
)
SCALE = jax.tree.map(lambda p: 1.0 + p**2, PARAMS)


def step(params):
    tx = update_projection(S, 1e-2)
    return tx.update(tree(3), tx.init(params), params)[0]


PROGRAMS = {
    "project_out": lambda p: project_out(p, S, SCALE),
    "update_projection": step,
    "principal_angles": lambda p: principal_angles(S, OTHER),
    "merge": lambda p: merge(S, OTHER, max_rank=8).basis,
    "contrast": lambda p: contrast(S, OTHER, max_rank=8).basis,
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("axes", [1, 2])
def test_mapped_over_layers_it_is_the_decomposition_of_each(name, axes):
    function, x = getattr(decompositions, name), MATRICES
    for _ in range(axes - 1):
        x = x[None]
    for _ in range(axes):
        function = jax.vmap(function)
    want = [TWINS[name](np.asarray(m, np.float64)) for m in MATRICES]
    for i, found in enumerate(jax.tree.leaves(function(x))):
        parts = [w[i] if isinstance(w, tuple) else w for w in want]
        # Signs of vectors are free.
        np.testing.assert_allclose(
            np.abs(found).reshape(3, *parts[0].shape), np.abs(parts), atol=1e-4
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_gives_lapack_a_batch(name):
    """Two batches at once stop a program for ever where two threads run it."""
    text = jax.jit(PROGRAMS[name]).lower(PARAMS).compile().as_text() or ""
    calls = [
        line.split("custom_call_target")[0]
        for line in text.splitlines()
        if 'custom_call_target="lapack_' in line
    ]
    assert calls
    assert not [line for line in calls if re.search(r"f32\[\d+,\d+,\d+\]", line)]


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_a_factor_or_a_vector_may_be_shared_by_the_layers(axes):
    def solved(factor, x):
        return decompositions.backward(factor, decompositions.forward(factor, x))

    factors = jnp.linalg.cholesky(MATRICES)
    vectors = jax.random.normal(jax.random.key(2), (3, 6))
    given = [
        x if a == 0 else x[0] for x, a in zip((factors, vectors), axes, strict=True)
    ]
    found = jax.vmap(solved, axes)(*given)
    for i in range(3):
        k, j = (i if a == 0 else 0 for a in axes)
        want = np.linalg.solve(np.asarray(MATRICES[k], np.float64), vectors[j])
        np.testing.assert_allclose(found[i], want, atol=1e-4)


def test_a_second_call_outside_of_a_program_compiles_nothing():
    angles = principal_angles(S, OTHER)
    with compiled() as seconds:
        again = principal_angles(S, OTHER)
    assert seconds == []
    jax.tree.map(np.testing.assert_array_equal, again, angles)


STEPS = """
import os
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:2]))
import jax, jax.numpy as jnp
from sbr_jax import from_factors, project_out

key, names = jax.random.key(0), "abcdefgh"
drawn = {n: jax.random.normal(jax.random.fold_in(key, i), (128, 4, 2048))
         for i, n in enumerate(names)}
s = from_factors(drawn, max_rank=64, layer_axes=1)
w = {n: jax.random.normal(key, (4, 512, 2048)) for n in names}
x, c = jax.random.normal(key, (256, 512)), {n: jnp.ones((4, 2048)) for n in names}

@jax.jit
def step(w, x):
    u = {n: jnp.tanh(jnp.einsum("bi,lip->lbp", x, w[n])).mean(1) for n in names}
    return project_out(u, s, c)

for _ in range(10):
    jax.block_until_ready(step(w, x))
"""


@pytest.mark.thorough
def test_steps_of_many_units_end_on_two_cores():
    """The program that stopped for ever at its second step."""
    subprocess.run([sys.executable, "-c", STEPS], check=True, timeout=300)

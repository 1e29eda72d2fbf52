"""A tree of parameters, a subspace of it, and a few steps."""

import chex
import jax.numpy as jnp
import numpy as np

from sbr_jax import from_factors

SHAPES = {"v": (3, 20), "w": (3, 8, 5)}  # three layers


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree(seed, scale=1.0):
    return {k: scale * normal(seed + i, *s) for i, (k, s) in enumerate(SHAPES.items())}


def space(seed, rows=3, scale=1.0):
    factors = {k: scale * normal(seed, rows, *s) for k, s in SHAPES.items()}
    return from_factors(factors, max_rank=4, energy=1.0, layer_axes=1)


PARAMS = tree(0)
S = space(10)


def close(a, b, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)

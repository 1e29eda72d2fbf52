"""A tree of parameters, a subspace of it, and a compiled recipe."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbr_jax import from_factors, update_projection

SHAPES = {"v": (3, 20), "w": (3, 8, 5)}  # three layers


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree(seed, scale=1.0):
    return {k: scale * normal(seed + i, *s) for i, (k, s) in enumerate(SHAPES.items())}


def space(seed, rows=3, scale=1.0):
    """Of up to three rows: zeros below them make a smaller rank no other program."""
    factors = {
        k: scale * normal(seed, 3, *s).at[rows:].set(0.0) for k, s in SHAPES.items()
    }
    return from_factors(factors, max_rank=4, energy=1.0, layer_axes=1)


PARAMS = tree(0)
S = space(10)


@functools.cache
def projecting(**settings):
    """A compiled `update_projection`; subspace and α are those of the state it gets."""
    return jax.jit(update_projection(S, 1e-2, **settings).update)


def close(a, b, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def adamw(rate, **settings):
    """Optax's own needs implicit promotion (int32 step count ** float)."""
    inner = optax.adamw(rate, **settings)

    def update(*args, **extra):
        del extra
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(*args)

    return optax.GradientTransformationExtraArgs(inner.init, update)

"""Trees of arrays: compared leaf by leaf, as one vector, moved and stacked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def same(one, two):
    chex.assert_trees_all_equal_dtypes(one, two)
    chex.assert_trees_all_equal(one, two)


def vector(tree):
    """All leaves as one vector, float64."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])


def jitter(tree, seed, size=0.1):
    """The tree with noise on every leaf, so that B of an adapter is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, size, x.shape), x.dtype), tree
    )


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)

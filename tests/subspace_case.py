"""Random factors, and what one looks at in a subspace."""

import jax.numpy as jnp
import numpy as np
import reference

from sbr_jax import effective_rank, from_factors


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain(rows, max_rank=16, energy=1.0):
    """Subspace of one unit "w" from rows [N, P]."""
    return from_factors({"w": jnp.asarray(rows)}, max_rank=max_rank, energy=energy)


def rank(s):
    return np.asarray(effective_rank(s)["w"]).tolist()


def gram_error(basis):
    v = reference.columns(basis)
    return np.abs(v.T @ v - np.eye(v.shape[1])).max()

"""A small quantised base, shared by what looks at its codes, model and files."""

import functools

import jax
import jax.numpy as jnp
from checkpoints import params

from sbr_jax import models
from sbr_jax.models.quantize import quantize

BLOCK = 8
"""Two blocks of a width of 16; the MLP's 20 inputs leave the third unfilled."""
DEEP = models.ModelConfig(
    vocab_size=16, width=64, mlp_width=128, layers=8, heads=2, init_scale=0.1
)
"""Deep enough for one layer to be little of the model."""


def weight(inputs=20, outputs=3, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), (inputs, outputs), dtype)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@functools.cache
def coded(kind):
    return quantize(params(), kind, block=BLOCK)

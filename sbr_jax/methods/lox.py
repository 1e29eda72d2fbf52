"""LoX: extrapolate the alignment before any fine-tuning.

Perin, Chen, Chen, Hirata, Wang, Hong, arXiv:2506.15606. For every matrix of a layer:

    W' = W_aligned + c · SVD_k(W_aligned − W_unaligned)

SVD_k keeps the k leading singular triples; k = 0 keeps all. Plain fine-tuning then
starts from W'. The study's own weights are not changed.

W' differs from the aligned model at step 0 already, so compare the two on the task too.
The released code edits every two-dimensional weight. Here only the projections of the
layers are edited; embedding and head stay as alignment left them.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from sbr_jax.checks import Range, checked
from sbr_jax.methods._alignment_direction import unaligned_layers, weight_change
from sbr_jax.methods.base import Method, Problem
from sbr_jax.settings import Positive
from sbr_jax.typing import PyTree, UserError


@checked
def lox(
    *,
    strength: Positive = 1.0,
    rank: Annotated[int, Range(least=0)] = 0,
    monitored: bool = False,
) -> Method:
    """LoX as published.

    Args:
      strength: c > 0.
      rank: k ≥ 0; the whole change is kept for 0, and for a k of at least a matrix's
        smaller side.
      monitored: run CSM.
    """

    def prepare(
        problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array
    ) -> PyTree:
        unaligned = unaligned_layers(problem, "lox")
        layers, moved = dict(base["layers"]), False
        for target, weight in base["layers"].items():
            if weight.ndim != 3:  # Stacked norms are vectors.
                continue
            change = weight_change(base, unaligned, target, "lox")
            moved = moved or bool(jnp.any(change != 0))
            layers[target] = _extrapolate(weight, change, strength, rank)
        if not moved:
            raise UserError(
                "lox: expected unaligned weights that differ from the aligned "
                "ones, got equal ones; give the weights from before alignment"
            )
        return {**base, "layers": layers}

    return Method("lox", monitored, prepare=prepare)


@functools.partial(jax.jit, static_argnames="rank")
def _extrapolate(
    weight: jax.Array, change: jax.Array, strength: float, rank: int
) -> jax.Array:
    """``W + c · SVD_k(change)``, added in float32 and rounded once."""
    if 0 < rank < min(change.shape[1:]):
        # One layer at a time, because a batched SVD holds the factors of all layers.
        change = jax.lax.map(functools.partial(truncate, rank=rank), change)
    return (weight.astype(jnp.float32) + strength * change).astype(weight.dtype)


def truncate(matrix: jax.Array, rank: int) -> jax.Array:
    """The best approximation of rank k of a float32 matrix (its leading triples).

    >>> truncate(jnp.diag(jnp.array([3.0, 1.0])), 1).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    scaled = left[:, :rank] * values[None, :rank]
    return jnp.matmul(scaled, right[:rank], precision="highest")

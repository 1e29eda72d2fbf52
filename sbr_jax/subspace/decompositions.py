"""Decompositions of small matrices, one after the other on a CPU.

On a CPU, a batch of matrices goes to LAPACK in parts, one per thread of the program,
and the calling thread waits for the others. If a program decomposes two batches at
once, as a step with several units does, two threads can wait for each other for ever
(seen on two cores with 8 units of 4 layers, at the second step). So on a CPU, ``vmap``
over layers becomes a loop. Elsewhere it is one batched call. No function here has a
reverse-mode derivative.

Symbols: L lower factor, K rows of a square matrix, U and V singular vectors, σ singular
values, R triangle.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of matrices that ``vmap`` turns into a loop on a CPU."""
    alone = jax.custom_batching.custom_vmap(function)

    # Jitted, because outside a program every call would compile a new loop.
    @jax.jit
    def each(*matrices: jax.Array) -> Any:
        return jax.lax.platform_dependent(
            *matrices,
            cpu=lambda *x: jax.lax.map(lambda one: alone(*one), x),
            default=jax.vmap(function),
        )

    @alone.def_vmap
    def rule(size: int, batched: list[bool], *given: jax.Array) -> tuple[Any, Any]:
        matrices = [
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip(given, batched, strict=True)
        ]
        # A loop cannot run over layers that are spread over devices.
        spread = jax.typeof(matrices[0]).sharding.spec[0] is not None
        found = (jax.vmap(function) if spread else each)(*matrices)
        return found, jax.tree.map(lambda x: True, found)

    return alone


@_in_turn
def cholesky(x: jax.Array) -> jax.Array:
    """Lower factor L of a positive matrix ``L Lᵀ [K, K]``.

    >>> cholesky(jnp.diag(jnp.array([4.0, 9.0]))).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    return jnp.linalg.cholesky(x)


@_in_turn
def forward(factor: jax.Array, x: jax.Array) -> jax.Array:
    """``L⁻¹ x`` of a lower factor L ``[K, K]`` and a vector or matrix."""
    return jax.scipy.linalg.solve_triangular(factor, x, lower=True)


@_in_turn
def backward(factor: jax.Array, x: jax.Array) -> jax.Array:
    """``L⁻ᵀ x``; after :func:`forward`, the solution y of ``L Lᵀ y = x``.

    >>> factor = cholesky(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
    >>> backward(factor, forward(factor, jnp.array([3.0, 3.0]))).round(4).tolist()
    [1.0, 1.0]
    """
    return jax.scipy.linalg.solve_triangular(factor, x, trans=1, lower=True)


@_in_turn
def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of one symmetric matrix."""
    return tuple(jnp.linalg.eigh(x))


@_in_turn
def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin singular value decomposition: ``U [N, K]``, σ ``[K]`` and ``Vᵀ [K, P]``."""
    return tuple(jnp.linalg.svd(x, full_matrices=False))


@_in_turn
def singular_values(x: jax.Array) -> jax.Array:
    """σ ``[K]`` of a matrix, descending."""
    return jnp.linalg.svd(x, compute_uv=False)


@_in_turn
def triangle(x: jax.Array) -> jax.Array:
    """The triangle R of ``x = Q R``, which has the same ``xᵀ x``."""
    return jnp.linalg.qr(x, mode="r")

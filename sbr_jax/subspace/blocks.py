"""Products of tall thin matrices, in place and one block of parameters at a time.

A whole product would hold a second, scaled or transposed copy of its operands; these
functions hold a copy of one block only. One array holds the rows of all layers, and a
layer is an index into it. If devices split the parameters, P is a device's own number,
and sums run over all devices.

Symbols: M rows [C, P] of a layer, C rows, P parameters, K columns, S a small matrix.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sbr_jax._mesh import Split, summed

Carry = TypeVar("Carry")

_HIGHEST = jax.lax.Precision.HIGHEST
LEAST, MOST, PARTS = 512, 4096, 16
"""Parameters of a block: a sixteenth of all, but at least 512 and at most 4096."""


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product at full float32 precision (TPU and GPU default to less)."""
    return jnp.matmul(a, b, precision=_HIGHEST)


def fold(step: Callable[[Any, int, Carry], Carry], size: int, carry: Carry) -> Carry:
    """``carry`` after ``step(first, width, carry)`` for every block of ``size``."""
    width = min(size, max(LEAST, min(size // PARTS, MOST)))
    full, rest = divmod(size, width)
    if full == 1:
        carry = step(0, width, carry)
    else:
        carry = jax.lax.fori_loop(
            0, full, lambda i, c: step(i * width, width, c), carry
        )
    return step(full * width, rest, carry) if rest else carry


def read(rows: jax.Array, layer: Any, first: Any, width: int) -> jax.Array:
    """A block ``[C, width]`` of one layer of ``[L, C, P]``."""
    block = jax.lax.dynamic_slice_in_dim(rows, first, width, axis=2)
    return jax.lax.dynamic_index_in_dim(block, layer, keepdims=False)


def gram(
    rows: jax.Array, layer: Any, unit: jax.Array, split: Split | None = None
) -> jax.Array:
    """``M Mᵀ [C, C]`` of one layer of ``[L, C, P]``, with M divided by ``unit``."""

    def step(first: Any, width: int, total: jax.Array) -> jax.Array:
        block = read(rows, layer, first, width) / unit
        return total + dot(block, block.T)

    count, size = rows.shape[1:]
    return summed(fold(step, size, jnp.zeros((count, count), rows.dtype)), split)


def times(
    rows: jax.Array,
    layer: Any,
    unit: jax.Array,
    x: jax.Array,
    split: Split | None = None,
) -> jax.Array:
    """``M X [C, K]`` for ``X [P, K]``."""

    def step(first: Any, width: int, total: jax.Array) -> jax.Array:
        right = jax.lax.dynamic_slice_in_dim(x, first, width)
        return total + dot(read(rows, layer, first, width) / unit, right)

    start = jnp.zeros((rows.shape[1], x.shape[1]), rows.dtype)
    return summed(fold(step, x.shape[0], start), split)


def transposed_times(
    rows: jax.Array, layer: Any, unit: jax.Array, s: jax.Array
) -> jax.Array:
    """``Mᵀ S [P, K]`` for ``S [C, K]``."""

    def step(first: Any, width: int, out: jax.Array) -> jax.Array:
        block = dot((read(rows, layer, first, width) / unit).T, s)
        return jax.lax.dynamic_update_slice_in_dim(out, block, first, axis=0)

    size = rows.shape[2]
    return fold(step, size, jnp.zeros((size, s.shape[1]), rows.dtype))


def columns_gram(x: jax.Array, split: Split | None = None) -> jax.Array:
    """``Xᵀ X [K, K]`` for ``X [P, K]``."""

    def step(first: Any, width: int, total: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(x, first, width)
        return total + dot(block.T, block)

    start = jnp.zeros((x.shape[1],) * 2, x.dtype)
    return summed(fold(step, x.shape[0], start), split)


def rotate_columns(x: jax.Array, s: jax.Array) -> jax.Array:
    """``X S [P, K]``, written over ``X [P, K]``."""

    def step(first: Any, width: int, out: jax.Array) -> jax.Array:
        block = dot(jax.lax.dynamic_slice_in_dim(out, first, width), s)
        return jax.lax.dynamic_update_slice_in_dim(out, block, first, axis=0)

    return fold(step, x.shape[0], x)


def place_columns(out: jax.Array, layer: Any, x: jax.Array, s: jax.Array) -> jax.Array:
    """``[L, P, K]`` with one layer replaced by ``X S``."""

    def step(first: Any, width: int, out: jax.Array) -> jax.Array:
        block = dot(jax.lax.dynamic_slice_in_dim(x, first, width), s)
        return jax.lax.dynamic_update_slice(out, block[None], (layer, first, 0))

    return fold(step, x.shape[0], out)


def rotate_rows(rows: jax.Array, layer: Any, s: jax.Array) -> jax.Array:
    """``[L, C, P]`` with one layer's M replaced by ``Sᵀ M`` and zeros below it."""
    more = rows.shape[1] - s.shape[1]

    def step(first: Any, width: int, out: jax.Array) -> jax.Array:
        block = jnp.pad(dot(s.T, read(out, layer, first, width)), ((0, more), (0, 0)))
        return jax.lax.dynamic_update_slice(out, block[None], (layer, 0, first))

    return fold(step, rows.shape[2], rows)

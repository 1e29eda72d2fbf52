"""Leading eigenpairs of ``F = Mᵀ M`` for one unit, without forming F.

If devices split the parameters, call these functions inside ``shard_map`` and pass the
`Split`. P is then a device's own number, and sums over parameters run over all devices.

Symbols: M rows of factors [C, P] with C rows, P parameters, K columns,
σ singular values of M, λ = σ² eigenvalues of F, ρ the energy to keep.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbr_jax import _mesh
from sbr_jax._mesh import Split
from sbr_jax.subspace import blocks, decompositions
from sbr_jax.subspace.blocks import dot as dot

# How far below ρ·total a float32 cumulative sum may fall by rounding alone.
_SLACK = 1e-6
# A unit column with less than this outside the span of the others depends on them.
# It is 32 units of float32 rounding.
_DEPENDENT = 32 * 2.0**-23
TINY = 2.0**-126  # the smallest float32 that is not flushed to zero


class Scaled(NamedTuple):
    """A sum of squares that may leave float32's range: ``value · unit²``.

    The unit is a power of two, so the result equals unscaled arithmetic bit for bit
    wherever that stays in range.
    """

    value: jax.Array
    unit: jax.Array

    def within(self, unit: jax.Array) -> jax.Array:
        """The value in another unit."""
        ratio = self.unit / unit
        return self.value * ratio * ratio

    def plain(self, least: float = TINY) -> jax.Array:
        """The number itself, raised to ``least`` if it is positive and smaller."""
        number = self.within(jnp.ones_like(self.unit))
        return jnp.where(self.value > 0, jnp.maximum(number, least), number)


def binary_unit(
    rows: jax.Array, axes: int | tuple[int, ...] | None, split: Split | None = None
) -> jax.Array:
    """The power of two at or below the largest entry, 1 where all are zero."""
    peak = jnp.max(jnp.abs(rows), axis=axes)
    if split is not None:
        peak = jax.lax.pmax(peak, split.axes)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(peak), peak, 1.0))
    # Both the unit and one over it have to be ordinary numbers.
    power = jnp.clip(exponent - 1, -126, 126)
    return jnp.where(peak > 0, jnp.ldexp(jnp.float32(1.0), power), 1.0)


@jax.jit
def sum_of_squares(rows: jax.Array) -> Scaled:
    """``Σ M²`` over the last two axes, whatever the scale of M."""
    unit = binary_unit(rows, (-2, -1))
    return Scaled(jnp.sum((rows / unit[..., None, None]) ** 2, axis=(-2, -1)), unit)


def add(a: Scaled, b: Scaled) -> Scaled:
    """Sum of two scaled numbers."""
    # Zeros have the unit 1, in which a small number would be lost.
    units = [jnp.where(x.value == 0, 0.0, x.unit) for x in (a, b)]
    unit = jnp.maximum(*units)
    unit = jnp.where(unit > 0, unit, 1.0)
    return Scaled(a.within(unit) + b.within(unit), unit)


def length_ratio(x: jax.Array, y: jax.Array, split: Split | None = None) -> jax.Array:
    """``‖x‖ / ‖y‖`` over the last axis, whatever their scale; y = 0 counts as 1."""
    unit_x, unit_y = (binary_unit(z, -1, split) for z in (x, y))
    top, bottom = (
        _length(z / unit[..., None], split) for z, unit in ((x, unit_x), (y, unit_y))
    )
    return unit_x / unit_y * (top / jnp.where(bottom > 0, bottom, 1.0))


def used_columns(basis: jax.Array, split: Split | None = None) -> jax.Array:
    """Mark the columns of ``basis [P, K]`` in use: bool ``[K]``."""
    used = jnp.any(basis != 0, axis=-2)
    if split is None:
        return used
    return jax.lax.pmax(used.astype(jnp.int32), split.axes) > 0


def masked(x: jax.Array, keep: jax.Array) -> jax.Array:
    """``x [..., K]`` with zeros in the columns that ``keep [K]`` leaves out."""
    return jnp.where(keep.reshape((1,) * (x.ndim - 1) + keep.shape), x, 0.0)


def polish(basis: jax.Array, split: Split | None = None) -> jax.Array:
    """One Newton-Schulz step to the nearest orthonormal basis; zero columns stay.

    An error ε in VᵀV becomes (3/4) ε², so only float32 rounding is left.
    """
    return blocks.rotate_columns(basis, polishing(basis, split))


def polishing(basis: jax.Array, split: Split | None = None) -> jax.Array:
    """The ``[K, K]`` matrix that `polish` multiplies a basis by."""
    gram = blocks.columns_gram(basis, split)
    return 1.5 * jnp.eye(len(gram)) - 0.5 * gram


def coordinates(
    vector: jax.Array, basis: jax.Array, split: Split | None = None
) -> jax.Array:
    """``Vᵀ u [K]``, in blocks, because one long thin product is slow and less exact."""
    block = math.gcd(basis.shape[0], 128)
    if block < 16:
        return _mesh.summed(dot(vector, basis), split)
    parts = dot(vector.reshape(-1, 1, block), basis.reshape(-1, block, basis.shape[1]))
    return _mesh.summed(jnp.sum(parts, axis=(0, 1)), split)


def _length(x: jax.Array, split: Split | None) -> jax.Array:
    """``‖x‖`` over the last axis."""
    if split is None:
        return jnp.linalg.norm(x, axis=-1)
    return jnp.sqrt(_mesh.summed(jnp.sum(x**2, axis=-1), split))


def orthonormal(
    columns: jax.Array, count: int | None = None, split: Split | None = None
) -> jax.Array:
    """Orthonormal basis ``[P, K]`` of columns ``[P, K]``, in place.

    With ``count ≤ P``, only the first ``count`` columns are processed; the others must
    be zero.

    This is Gram-Schmidt. Every column is projected, scaled and, if the projection
    removed a part of it, projected again. Once polished, the result is as exact as
    Householder's QR here, and the work stays on the accelerator. A column that depends
    on the earlier ones becomes zero: the projection leaves only rounding, which scaling
    would blow up to a direction inside their span.
    """
    place = jnp.arange(columns.shape[1])

    def remainder(column: jax.Array, q: jax.Array, j: jax.Array) -> jax.Array:
        inside = coordinates(column, q, split)
        return column - dot(q, jnp.where(place < j, inside, 0.0))

    def step(j: jax.Array, q: jax.Array) -> jax.Array:
        length = _length(q[:, j], split)
        once = remainder(q[:, j] / jnp.where(length > 0, length, 1.0), q, j)
        size = _length(once, split)
        once = once / jnp.where(size > 0, size, 1.0)
        # Rounding is relative to the column: small if little of it was removed.
        twice = jax.lax.cond(size > 0.9, lambda x, *_: x, remainder, once, q, j)
        left = _length(twice, split)
        # "Twice is enough": an independent column loses almost nothing the second
        # time; a column that loses a hundredth was only rounding.
        independent = (size > _DEPENDENT) & (left > 0.99)
        twice = jnp.where(independent, twice / jnp.where(left > 0, left, 1.0), 0.0)
        return q.at[:, j].set(twice)

    steps = columns.shape[1] if count is None else count
    return jax.lax.fori_loop(0, steps, step, columns)


def kept(
    eigenvalues: jax.Array,
    used: jax.Array,
    total: jax.Array,
    energy: jax.Array | float,
    start: jax.Array | float = 0.0,
) -> jax.Array:
    """Mark the leading eigenvalues that reach ``ρ · total``: bool ``[K]``.

    Keeps the smallest k with ``start + Σ_{j≤k} λ_j ≥ ρ · total``: one column more
    than the cumulative fractions strictly below ρ, which is the published rule. Two
    things differ from the published code: a total of 0 keeps nothing (there: one
    arbitrary column), and equality has a float32 slack of 1e-6. ``energy >= 1`` keeps
    every eigenvalue that is numerically not zero.
    """
    before = start + jnp.cumsum(eigenvalues) - eigenvalues
    return used & ((before < (energy - _SLACK) * total) | (energy >= 1.0))


def leading_eigenpairs(
    rows: jax.Array,
    total: Scaled,
    *,
    columns: int,
    energy: float,
    split: Split | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors ``[P, columns]`` and eigenvalues ``[columns]`` of ``F = Mᵀ M``.

    The route goes through the Gram matrix: ``M Mᵀ = Q W Qᵀ``, ``X = Mᵀ Q`` with unit
    columns, Gram-Schmidt on X, then Rayleigh-Ritz (an SVD of the small ``M X``). The
    Gram matrix squares the condition number; the last two steps work on M itself and
    undo this.

    **Guarantee**: used columns are orthonormal to about 1e-6, unused ones are zero
    and last; eigenvalues below ``(16 ε √C)² · tr F`` (ε = 2⁻²³) count as zero. The
    scale of M changes only the eigenvalues; for used columns they are at least
    2⁻¹²⁶, float32's smallest normal number. Apart from M, the result and one block, no
    array of P entries is held, unless M has more rows than columns.
    """
    of = measure(rows[None], split)
    basis, values = layer_eigenpairs(of, 0, total, columns, energy, split=split)
    return polish(basis, split), values


class Measured(NamedTuple):
    """Rows ``[L, C, P]`` with their binary units ``[L]``."""

    rows: jax.Array
    unit: jax.Array


def measure(rows: jax.Array, split: Split | None = None) -> Measured:
    """The rows, with their binary units."""
    return Measured(rows, binary_unit(rows, (-2, -1), split))


def layer_eigenpairs(
    of: Measured,
    layer: Any,
    total: Scaled,
    columns: int,
    energy: jax.Array | float,
    count: Any = 1,
    split: Split | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``leading_eigenpairs`` before polishing, for one layer's ``Mᵀ M / count``."""
    unit = of.unit[layer]
    x, right, values, used = _ritz(of, layer, columns, None, split)
    keep = kept(values, used, total.within(unit), energy)
    values = Scaled(masked(values / count, keep), unit).plain()
    return blocks.rotate_columns(x, masked(right, keep)), values


def leading_eigenpairs_beside(
    rows: jax.Array,
    total: Scaled,
    protected: jax.Array,
    *,
    columns: int,
    energy: float,
    split: Split | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``leading_eigenpairs`` that always keeps the columns ``protected [P, K₀]``.

    The protected columns come first and unchanged, and a protected column v has the
    value ``vᵀ F v``. Eigenpairs of F restricted to their complement follow until the
    energy is reached.
    """

    def across(a: jax.Array, b: jax.Array) -> jax.Array:
        return _mesh.summed(dot(a, b), split)

    whole = total.plain()
    first = used_columns(protected, split)
    first_values = jnp.sum(across(rows, protected) ** 2, axis=0)
    rest = rows - dot(across(rows, protected), protected.T)
    size = _mesh.summed(jnp.sum(rows**2), split)
    # Squares of tiny rows may underflow to zero; then take the trace of F.
    size = jnp.sqrt(jnp.where(size > 0, size, whole))
    of = measure(rest[None], split)
    x, right, values, used = _ritz(of, 0, columns, size / of.unit[0], split)
    values = Scaled(values, of.unit[0]).within(jnp.ones_like(of.unit[0]))
    basis = blocks.rotate_columns(x, masked(right, used))
    # Ritz vectors of rounding-sized rows may point back into the protected span.
    basis = basis - dot(protected, across(protected.T, basis))
    keep = kept(values, used, whole, energy, jnp.sum(first_values))
    joined = jnp.concatenate([protected, polish(masked(basis, keep), split)], axis=1)
    values = jnp.concatenate([first_values, masked(jnp.maximum(values, TINY), keep)])
    order = jnp.argsort(~jnp.concatenate([first, keep]), stable=True)[:columns]
    return _pad(joined[:, order], columns), _pad(values[order], columns)


def _ritz(
    of: Measured,
    layer: Any,
    columns: int,
    norm: jax.Array | None,
    split: Split | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ritz vectors as X times a small matrix, their values, and which of them count.

    X is ``[P, columns]``; values are in the layer's unit. A parameter without any
    gradient has a zero row in X, and so in every vector.
    """
    rows, unit = of.rows, of.unit[layer]
    size = rows.shape[2] * (1 if split is None else split.parts)
    count = min(columns, rows.shape[1], size)
    floor = 16 * jnp.finfo(jnp.float32).eps * rows.shape[1] ** 0.5
    if rows.shape[1] > size and split is None:  # Rᵀ R = Mᵀ M, and R is smaller
        rows = decompositions.triangle(rows[layer] / unit)[None]
        layer, unit = 0, jnp.ones_like(unit)
    gram = blocks.gram(rows, layer, unit, split)
    norm = jnp.sqrt(jnp.trace(gram)) if norm is None else norm
    _, q = apart(decompositions.eigh, split)(gram)
    # X has the width of the result from the start, so no copy is needed later.
    x = blocks.transposed_times(rows, layer, unit, _pad(q[:, ::-1][:, :count], columns))
    x = orthonormal(x, count, split)
    products = blocks.times(rows, layer, unit, x, split)[:, :count]
    _, sigma, right = apart(decompositions.svd, split)(products)
    sigma = _pad(sigma, columns)
    right = jnp.pad(right.T, [(0, columns - count)] * 2)
    used = sigma > floor * norm
    return x, right, jnp.where(used, sigma, 0.0) ** 2, used


@functools.lru_cache
def apart(function: Callable[..., Any], split: Split | None) -> Callable[..., Any]:
    """A function of a small matrix whose ``vmap`` over layers is shared by devices.

    Each device handles its own layers and receives the other results.

    Args:
        function: a function of one matrix.
        split: the devices, all of which hold all matrices; None for one device.
    """
    if split is None:
        return function
    shared = jax.custom_batching.custom_vmap(function)

    @shared.def_vmap
    def rule(size: int, batched: Any, matrices: jax.Array) -> tuple[Any, Any]:
        del batched
        own = math.ceil(size / split.parts)
        first = jax.lax.axis_index(split.axes) * own
        layers = first + jnp.arange(own, dtype=jnp.int32)
        found = jax.vmap(function)(matrices[jnp.minimum(layers, size - 1)])

        def told(x: jax.Array) -> jax.Array:
            out = jnp.zeros((size, *x.shape[1:]), x.dtype)
            return _mesh.summed(out.at[layers].set(x, mode="drop"), split)

        found = jax.tree.map(told, found)
        return found, jax.tree.map(lambda x: True, found)

    return shared


def _pad(x: jax.Array, columns: int) -> jax.Array:
    extra = columns - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])

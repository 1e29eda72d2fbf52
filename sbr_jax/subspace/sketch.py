"""A buffer of fixed size that approximates all rows ever written to it.

A full buffer is cut to ``keep`` rows. The rows are rotated to the eigenvectors of their
Gram matrix, and only the strongest ``keep`` stay. The largest dropped eigenvalue is
then subtracted from the weaker half of those that stay (frequent directions with
α = 1/2). So a direction that is weak in each batch but strong over all is not lost.

Let δ be the largest eigenvalue that a cut drops. The cut takes between 0 and δ off
every direction, and at least mδ off the trace, with ``m = keep − ⌊keep/2⌋ + 1``. Hence,
with Δ the sum of all δ: ``0 ≼ F − F̂ ≼ Δ I`` and ``Δ ≤ (tr F − tr F̂) / m``, and
``Δ ≤ Σ_{j>k} λ_j / (m − k)`` for every ``k < m``.

On a mesh, every device holds its own parameters of all rows.

Symbols: M rows [C, P] of a layer, C rows, P parameters, L layers, F = Σ g gᵀ over all
rows g ever written, F̂ the same over the rows held, λ eigenvalues of F.

References:
    Desai, Ghashami, Phillips 2016: https://arxiv.org/abs/1501.06561
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sbr_jax import _mesh
from sbr_jax._mesh import Split
from sbr_jax.subspace import blocks, decompositions, spectrum, units
from sbr_jax.typing import PyTree, UserError

OVERHEAD = 1.3
"""Peak memory of an estimate over that of basis, microbatch and rows."""


class Plan(NamedTuple):
    """Numbers of gradients: computed at once, in a full buffer, and after a cut."""

    microbatch: int
    rows: int
    keep: int


def plan(
    parameters: int,
    max_rank: int,
    microbatch: int,
    rows: int,
    memory_budget: float | None = None,
) -> Plan:
    """The sizes of an estimate, chosen to fit the memory budget if there is one.

    Args:
        parameters: number of parameters in all units and layers.
        max_rank: K, the columns of the basis; a cut keeps at least K rows.
        microbatch: most gradients computed at once.
        rows: rows of the buffer, if there is no budget.
        memory_budget: bytes for basis, microbatch and rows together.

    Raises:
        UserError: for a budget that does not fit a microbatch of one.
    """
    if memory_budget is not None:
        one = 4 * parameters
        most = int(memory_budget / (OVERHEAD * one))
        if most < 2 * max_rank + 2:
            least = OVERHEAD * one * (2 * max_rank + 2)
            raise UserError(
                f"expected a memory budget of at least {math.ceil(least)} bytes "
                f"({least / 2**30:.3g} GiB) for a basis of {max_rank} columns, as many "
                f"rows and one gradient, got {memory_budget:.0f}; raise it or lower "
                "max_rank"
            )
        free = most - 2 * max_rank
        microbatch = max(1, min(microbatch, free // 2, (most - max_rank) // 8))
        rows = most - max_rank - microbatch
    rows = max(rows, max_rank + microbatch)
    return Plan(microbatch, rows, max(max_rank, min(rows // 2, rows - microbatch)))


def reserve(
    mark: units.Fingerprint, rows: int, mesh: Mesh | None = None
) -> list[jax.Array]:
    """Zeros ``[L, rows, P]`` for each unit, with joined layer axes and P split."""
    shapes = [
        (spec.layers(mark.layer_axes), spec.size(mark.layer_axes))
        for spec in mark.units
    ]

    def place(size: int) -> NamedSharding | None:
        if mesh is None:
            return None
        spec = PartitionSpec(None, None, _mesh.dividing(size, mesh))
        return NamedSharding(mesh, spec)

    return [
        jnp.zeros((math.prod(layers), rows, size), device=place(size))
        for layers, size in shapes
    ]


@functools.partial(jax.jit, donate_argnames="held", static_argnames=("mark", "mesh"))
def write(
    held: list[jax.Array],
    parts: list[PyTree],
    place: jax.Array,
    count: jax.Array,
    *,
    mark: units.Fingerprint,
    mesh: Mesh | None = None,
) -> list[jax.Array]:
    """Write ``count`` examples' gradients into the buffers, from row ``place`` on.

    Args:
        held: buffers ``[L, C, P]``, which are donated.
        parts: gradients of each unit, leaves ``[B, *leaf.shape]``.
        place: row of the first gradient.
        count: how many of the B examples to write.
        mark: fingerprint of the parameters.
        mesh: mesh that buffers and examples are split over.
    """
    if mesh is not None:
        pairs = zip(held, parts, strict=True)
        return [_write_split(*pair, place, count, mark, mesh) for pair in pairs]

    def one(i: jax.Array, held: list[jax.Array]) -> list[jax.Array]:
        out = []
        for rows, part in zip(held, parts, strict=True):
            at = 0
            for leaf in jax.tree.leaves(part):
                new = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
                new = new.astype(jnp.float32).reshape(len(rows), 1, -1)
                rows = jax.lax.dynamic_update_slice(rows, new, (0, place + i, at))
                at += new.shape[-1]
            out.append(rows)
        return out

    return jax.lax.fori_loop(0, count, one, held)


def _write_split(
    rows: jax.Array,
    part: PyTree,
    place: jax.Array,
    count: jax.Array,
    mark: units.Fingerprint,
    mesh: Mesh,
) -> jax.Array:
    """`write` for one unit: from examples over devices to parameters over devices."""
    size = rows.shape[2]
    kept, by_row = _mesh.dividing(size, mesh), _mesh.row_axes(mesh)
    new = [
        leaf.astype(jnp.float32).reshape(leaf.shape[0], len(rows), -1)
        for leaf in jax.tree.leaves(part)
    ]

    def own(rows: jax.Array, new: list[jax.Array], place: jax.Array, count: jax.Array):
        turned = _turned(jnp.concatenate(new, axis=-1), mesh, kept, by_row)

        def one(i: jax.Array, rows: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(turned, i, 1, axis=0)
            return jax.lax.dynamic_update_slice(
                rows, jnp.swapaxes(row, 0, 1), (0, place + i, 0)
            )

        return jax.lax.fori_loop(0, count, one, rows)

    held, whole = Split(mesh, kept).along(2), PartitionSpec()
    given = (held, PartitionSpec(by_row), whole, whole)
    return _mesh.per_device(own, mesh, given, held)(rows, new, place, count)


def _turned(
    new: jax.Array, mesh: Mesh, kept: tuple[str, ...], by_row: tuple[str, ...]
) -> jax.Array:
    """A device's own parameters of all B examples, ``[B, L, P / parts]``.

    Args:
        new: all parameters of a device's own examples, ``[B / devices, L, P]``.
        mesh: mesh of the devices.
        kept: axes that parameters are split over.
        by_row: axes that examples are split over.
    """
    pieces = [mesh.shape[axis] for axis in kept]
    new = new.reshape(*new.shape[:2], *pieces, -1)
    for place, axis in enumerate(kept):
        if axis not in by_row:  # All devices along this axis have the same examples.
            index = jax.lax.axis_index(axis)
            new = jax.lax.dynamic_slice_in_dim(new, index, 1, axis=2 + place)
    for axis in reversed(by_row):
        if axis in kept:
            new = jax.lax.all_to_all(new, axis, 2 + kept.index(axis), 0, tiled=True)
        else:
            new = jax.lax.all_gather(new, axis, axis=0, tiled=True)
    return new.reshape(*new.shape[:2], -1)


@functools.partial(jax.jit, donate_argnames="rows", static_argnames=("keep", "split"))
def cut(rows: jax.Array, *, keep: int, split: Split | None = None) -> jax.Array:
    """Cut ``[L, C, P]`` to the ``keep < C`` strongest rows; the others become zero."""

    def one(layer: Any, rows: jax.Array, unit: jax.Array) -> jax.Array:
        gram = blocks.gram(rows, layer, unit[layer], split)
        values, q = spectrum.apart(decompositions.eigh, split)(gram)
        values, q = jnp.maximum(values[::-1], 0.0), q[:, ::-1]
        less = jnp.where(jnp.arange(keep) < keep // 2, 0.0, values[keep])
        held = values[:keep]
        share = jnp.where(held > 0, 1.0 - less / jnp.where(held > 0, held, 1.0), 0.0)
        return blocks.rotate_rows(rows, layer, q[:, :keep] * jnp.sqrt(share)[None])

    # Eigenvalues scale with the square of the rows, which may leave float32's range.
    def at_once(rows: jax.Array) -> jax.Array:
        unit = spectrum.binary_unit(rows, (-2, -1), split)
        return jax.vmap(lambda r, u: one(0, r[None], u[None])[0])(rows, unit)

    if split is not None:
        held = split.along(2)
        return _mesh.per_device(at_once, split.mesh, held, held)(rows)
    unit = spectrum.binary_unit(rows, (-2, -1))
    return jax.lax.fori_loop(0, len(rows), lambda i, r: one(i, r, unit), rows)

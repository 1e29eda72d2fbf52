"""The mesh in use during tracing, and constraints that do nothing without one.

A mesh has some or all of the axes ``data``, ``fsdp`` and ``tp``. Rows of a batch are
split over ``data`` and ``fsdp``. The parameters of a subspace are split over all axes.
Heads and the vocabulary are split over ``tp``. Only this module and
`sbr_jax.models.sharding` use these names.

The mesh is read from JAX's own context, which is part of JAX's cache keys.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sbr_jax import checks
from sbr_jax.typing import PyTree

AXES = ("data", "fsdp", "tp")
"""Axes of a mesh, from the slowest links to the fastest."""

ROWS = ("data", "fsdp")
"""Axes that the rows of a batch are split over."""


def holding(tree: PyTree) -> Mesh | None:
    """The mesh that a tree's arrays lie on; None on a single device.

    Traced arrays and NumPy arrays are on no mesh.
    """
    for leaf in jax.tree.leaves(tree):
        own = None if checks.is_traced(leaf) else getattr(leaf, "sharding", None)
        if isinstance(own, NamedSharding) and own.mesh.size > 1:
            return own.mesh if isinstance(own.mesh, Mesh) else None
    return None


class Split(NamedTuple):
    """A dimension that is split over some axes of a mesh, one part per device.

    Inside ``shard_map``, sums over the dimension must also be summed over the axes.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Number of parts."""
        return parts(self.axes, self.mesh)

    def along(self, dimension: int) -> P:
        """The spec of an array with only this dimension split."""
        return P(*[None] * dimension, self.axes)


def per_device(
    function: Callable[..., Any], mesh: Mesh | AbstractMesh, given: Any, found: Any
) -> Callable[..., Any]:
    """Run a function on each device's own part of arrays: ``shard_map``, unchecked.

    Args:
      function: takes and returns one device's parts.
      mesh: the devices.
      given: specs of the arguments.
      found: specs of the result.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=given, out_specs=found, check_vma=False
    )


def splitting(size: int, mesh: Mesh | AbstractMesh | None) -> Split | None:
    """How a mesh splits ``size`` parameters; None if it does not."""
    axes = dividing(size, mesh)
    return Split(mesh, axes) if mesh is not None and axes else None


def split_of(array: Any, dimension: int) -> Split | None:
    """How a dimension of an array is split; None unless it is the only one split."""
    own = None if checks.is_traced(array) else getattr(array, "sharding", None)
    if not isinstance(own, NamedSharding) or not isinstance(own.mesh, Mesh):
        return None
    spec = [*own.spec, *[None] * (array.ndim - len(own.spec))]
    axes = spec.pop(dimension)
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    if not axes or any(spec) or parts(axes, own.mesh) == 1:
        return None
    return Split(own.mesh, axes)


def summed(x: jax.Array, split: Split | None) -> jax.Array:
    """The sum of x over the devices of a split; x itself without a split."""
    return x if split is None else jax.lax.psum(x, split.axes)


def using(mesh: Mesh | AbstractMesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for a mesh; no effect for None."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    return jax.sharding.use_abstract_mesh(abstract)


def current() -> AbstractMesh | None:
    """The mesh in use, if the compiler may choose shardings on it; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside shard_map nothing is left to split, and explicit axes are the caller's.
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def dividing(
    size: int, mesh: Mesh | AbstractMesh | None, axes: Sequence[str] = AXES
) -> tuple[str, ...]:
    """The axes that can split a dimension of this size into equal parts.

    >>> mesh = AbstractMesh((2, 3, 2), AXES)
    >>> dividing(12, mesh), dividing(8, mesh), dividing(12, mesh, ROWS)
    (('data', 'fsdp', 'tp'), ('data', 'tp'), ('data', 'fsdp'))
    """
    found: list[str] = []
    parts = 1
    for axis in axes if mesh is not None else ():
        count = mesh.shape.get(axis, 1)  # pyright: ignore[reportOptionalMemberAccess]
        if count > 1 and size % (parts * count) == 0:
            found.append(axis)
            parts *= count
    return tuple(found)


def parts(axes: Sequence[str], mesh: Mesh | AbstractMesh | None) -> int:
    """Number of parts that axes split a dimension into."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in axes)


def row_axes(mesh: Mesh | AbstractMesh | None) -> tuple[str, ...]:
    """The axes of a mesh that split rows."""
    return tuple(axis for axis in ROWS if parts((axis,), mesh) > 1)


def row_parts(rows: int) -> int:
    """Number of parts that the mesh in use splits rows into; 1 if not evenly."""
    mesh = current()
    count = parts(ROWS, mesh)
    return count if rows % count == 0 else 1


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Constrain how an array lies on the mesh in use; no effect without a mesh.

    Args:
      x: any array.
      spec: as for ``PartitionSpec``; axes that do not divide the size are left out.
    """
    mesh = current()
    if mesh is None:
        return x
    axes = [
        dividing(size, mesh, (axis,) if isinstance(axis, str) else axis)
        if isinstance(axis, str | tuple)
        else axis
        for size, axis in zip(x.shape, spec, strict=False)
    ]
    fitted = P(*(axis or None if isinstance(axis, tuple) else axis for axis in axes))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitted))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Split the first axis over ``data`` and ``fsdp`` and keep the others whole.

    If there are fewer rows than parts, the compiler pads them, which is less work than
    a copy of all rows on every device. A single row stays as it is: it belongs to an
    example that ``vmap`` maps over.
    """
    mesh = current()
    if mesh is None or x.shape[0] == 1:
        return x
    rows = row_axes(mesh)
    if not rows:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(rows)))


def constrain_last(x: jax.Array, axis: str = "tp") -> jax.Array:
    """Split the last axis over ``tp`` if that divides it; leave the others free."""
    mesh = current()
    if mesh is None:
        return x
    free = [P.UNCONSTRAINED] * (x.ndim - 1)
    return constrain(x, *free, axis)

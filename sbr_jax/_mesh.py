"""Mesh in use while a program is traced, and constraints that vanish without one.

A mesh has the axes ``data``, ``fsdp`` and ``tp``, or some of them. Rows of a batch are
split over ``data`` and ``fsdp``; what a subspace holds for each parameter is split over
all of them, and ``tp`` shares heads and the vocabulary. The names are met here and in
`sbr_jax.models.sharding` alone.

Nothing is captured: the mesh is that of JAX's own context, which its caches know.
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
"""Axes of a mesh, the slowest links first."""

ROWS = ("data", "fsdp")
"""Axes that share the rows of a batch."""


def holding(tree: PyTree) -> Mesh | None:
    """The mesh of several devices that a tree's arrays lie on; None for one device.

    Traced arrays and those of NumPy lie nowhere yet.
    """
    for leaf in jax.tree.leaves(tree):
        own = None if checks.is_traced(leaf) else getattr(leaf, "sharding", None)
        if isinstance(own, NamedSharding) and own.mesh.size > 1:
            return own.mesh if isinstance(own.mesh, Mesh) else None
    return None


class Split(NamedTuple):
    """Devices that share a dimension, a part each: all along some axes of a mesh.

    Inside ``shard_map``, sums over the dimension are then summed over the axes.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return parts(self.axes, self.mesh)

    def along(self, dimension: int) -> P:
        """The spec of an array of which one dimension is split, the others whole."""
        return P(*[None] * dimension, self.axes)


def per_device(
    function: Callable[..., Any], mesh: Mesh | AbstractMesh, given: Any, found: Any
) -> Callable[..., Any]:
    """A function of what each device has of arrays: ``shard_map``, unchecked.

    Args:
      function: of a device's own parts.
      mesh: of the devices.
      given: specs of the arguments.
      found: specs of the result.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=given, out_specs=found, check_vma=False
    )


def splitting(size: int, mesh: Mesh | AbstractMesh | None) -> Split | None:
    """How a mesh splits parameters; None where it does not."""
    axes = dividing(size, mesh)
    return Split(mesh, axes) if mesh is not None and axes else None


def split_of(array: Any, dimension: int) -> Split | None:
    """How a dimension of an array is split, and it alone; None where it is not."""
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
    """A sum over what the devices of a split have each; as it is without one."""
    return x if split is None else jax.lax.psum(x, split.axes)


def using(mesh: Mesh | AbstractMesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which a program is traced for a mesh; nothing for None."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    return jax.sharding.use_abstract_mesh(abstract)


def current() -> AbstractMesh | None:
    """The mesh that is in use, where the compiler is left to split what it can."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside shard_map there is nothing to split, and explicit axes are the caller's.
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def dividing(
    size: int, mesh: Mesh | AbstractMesh | None, axes: Sequence[str] = AXES
) -> tuple[str, ...]:
    """Those of the axes that a dimension can be split over, each in equal parts.

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
    """How many parts axes split a dimension into."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in axes)


def row_axes(mesh: Mesh | AbstractMesh | None) -> tuple[str, ...]:
    """The axes that a mesh has for rows."""
    return tuple(axis for axis in ROWS if parts((axis,), mesh) > 1)


def row_parts(rows: int) -> int:
    """How many parts the mesh in use splits rows into; 1 where it cannot, evenly."""
    mesh = current()
    count = parts(ROWS, mesh)
    return count if rows % count == 0 else 1


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """An array as it is to lie on the mesh in use; itself where there is none.

    Args:
      x: any array.
      spec: as of ``PartitionSpec``; axes that do not divide are left out.
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
    """The first axis over ``data`` and ``fsdp``, the others whole.

    Fewer rows than there are parts are filled up by the compiler: that is less work
    than having all of them everywhere. A single row is that of an example that is
    mapped over.
    """
    mesh = current()
    if mesh is None or x.shape[0] == 1:
        return x
    rows = row_axes(mesh)
    if not rows:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(rows)))


def constrain_last(x: jax.Array, axis: str = "tp") -> jax.Array:
    """The last axis over ``tp`` where that divides, the others as they come."""
    mesh = current()
    if mesh is None:
        return x
    free = [P.UNCONSTRAINED] * (x.ndim - 1)
    return constrain(x, *free, axis)

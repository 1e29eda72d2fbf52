"""Meshes, and where the arrays of a training job live on them.

Frozen weights follow ``models.partition_specs``; adapters, and every array of the
optimizer's state that mirrors one, follow ``models.adapter_partition_specs``; batches
are split over ``fsdp``; everything else is replicated. The compiler does the rest:
the step itself knows nothing about meshes.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sbr_jax import models
from sbr_jax.models.sharding import fit_spec
from sbr_jax.settings import Hardware
from sbr_jax.typing import PyTree, UserError

AXES = ("fsdp", "tp")


def parse_mesh(text: str) -> dict[str, int]:
    """Reads ``"fsdp=4,tp=2"``.

    Args:
      text: comma-separated ``axis=size``; the axes are ``fsdp`` (weights and batch)
        and ``tp`` (tensor parallel). A missing axis has size 1.

    Returns:
      Sizes by axis, in the order of :data:`AXES`.

    Raises:
      UserError: for anything else.

    >>> parse_mesh("tp=2,fsdp=4")
    {'fsdp': 4, 'tp': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in AXES or name in sizes or not value.isdigit() or int(value) < 1:
            raise UserError(
                f"mesh {text!r}: expected axis=size pairs such as fsdp=4,tp=2, axes "
                f"{' and '.join(AXES)}, each once and at least 1; got {part.strip()!r}"
            )
        sizes[name] = int(value)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(text: str, devices: list[Any] | None = None) -> Mesh:
    """A mesh over the first devices, axes of type Auto.

    Args:
      text: see :func:`parse_mesh`.
      devices: all of this job's by default.

    Returns:
      A mesh with the axes ``fsdp`` and ``tp``.

    Raises:
      UserError: for a bad string, or more devices than there are.
    """
    sizes = parse_mesh(text)
    devices = jax.devices() if devices is None else devices
    count = math.prod(sizes.values())
    if count > len(devices):
        raise UserError(
            f"mesh {text!r} needs {count} devices, this job has {len(devices)}; make "
            "the axes smaller, or simulate devices on a CPU with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    array = np.asarray(devices[:count]).reshape(tuple(sizes.values()))
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(hardware: Hardware) -> Mesh | None:
    """The mesh that is asked for; None for one device."""
    wanted = hardware.mesh
    return None if wanted is None else make_mesh(wanted)


def mirrored_shardings(mesh: Mesh, tree: PyTree, adapter: PyTree) -> PyTree:
    """Shardings for a tree that holds copies of the adapter's structure.

    An array whose path ends like a path of the adapter, and which has its shape
    (moments, reference adapters, the adapter itself), is placed like it; every other
    array is replicated.

    Args:
      mesh: the mesh.
      tree: an optimizer state, a method's state, an adapter.
      adapter: the adapter.

    Returns:
      A tree of ``NamedSharding`` like ``tree``.
    """
    specs = models.adapter_partition_specs(adapter)
    placed = models.named_shardings(specs, adapter, mesh)
    known = {}
    arrays = jax.tree_util.tree_leaves_with_path(adapter)
    for (path, leaf), sharding in zip(arrays, jax.tree.leaves(placed), strict=True):
        known[_names(path), leaf.shape] = sharding
    depths = {len(path) for path, _ in known}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        names = _names(path)
        for depth in depths:
            found = known.get((names[-depth:], np.shape(leaf)))
            if found is not None:
                return found
        return replicated

    return jax.tree_util.tree_map_with_path(place, tree)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def place_base(mesh: Mesh | None, base: PyTree, config: Any) -> PyTree:
    """The frozen weights on the mesh (as they are without one)."""
    if mesh is None:
        return base
    specs = models.partition_specs(config)
    return jax.device_put(base, models.named_shardings(specs, base, mesh))


def place_like_adapter(mesh: Mesh | None, tree: PyTree, adapter: PyTree) -> PyTree:
    """A tree with copies of the adapter's structure on the mesh."""
    if mesh is None:
        return tree
    return jax.device_put(tree, mirrored_shardings(mesh, tree, adapter))


def place_batch(mesh: Mesh | None, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch split over ``fsdp`` (replicated where its size does not divide)."""
    if mesh is None:
        return batch
    # Packed microbatches have an axis before that of the rows.
    stacked = np.ndim(batch["tokens"]) > 2
    spec = PartitionSpec(None, "fsdp") if stacked else PartitionSpec("fsdp")
    return {
        name: jax.device_put(x, NamedSharding(mesh, fit_spec(spec, np.shape(x), mesh)))
        for name, x in batch.items()
    }

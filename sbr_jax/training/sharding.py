"""Meshes, and how every array of a training job is split over them.

A mesh has the axes ``data``, ``fsdp`` and ``tp`` and takes all devices of the job.

- Frozen weights ``[L, in, out]``: over ``fsdp`` and ``tp``; gathered over ``fsdp`` one
  layer at a time for the product. Embedding and head: V over ``tp``, D over ``fsdp``.
- Batch, hidden states, answer places: rows over ``data`` and ``fsdp``. Logits: also V
  over ``tp``.
- Adapter, moments: whole. They are small, and every layer needs its own.
- Bases ``[L, P, K]`` of subspaces, rows ``[L, R, P]`` of a Fisher: P over all axes. A
  sum over P is then a sum over devices.
- Everything else in a method's state: whole.

`base_shardings`, `state_shardings` (for an adapter, a `TrainState` or a method's state)
and `batch_shardings` give these placements for one mesh. They take trees of arrays or
of shapes. The mesh may consist of this job's devices or a topology's, or be abstract.
An axis that does not divide a dimension is not used for it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sbr_jax import _mesh, models
from sbr_jax.models.sharding import check_heads, fit_spec
from sbr_jax.settings import Hardware, Training
from sbr_jax.subspace import Subspace
from sbr_jax.typing import PyTree, UserError

AXES = _mesh.AXES
ROWS = _mesh.ROWS
REFERENCE = jax.tree_util.DictKey("reference")
"""The states ``[N, A, D]`` of a reference, in the state of a method that keeps them."""

AnyMesh = Mesh | AbstractMesh


# --- meshes ---------------------------------------------------------------------------


def parse_mesh(text: str) -> dict[str, int]:
    """Parses ``"data=2,fsdp=4,tp=2"``: sizes by axis, in the order of :data:`AXES`.

    Axes are ``data`` (examples), ``fsdp`` (examples and weights) and ``tp`` (heads); a
    missing one has size 1.

    Raises:
      UserError: for anything else.

    >>> parse_mesh("tp=2,fsdp=4")
    {'data': 1, 'fsdp': 4, 'tp': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in AXES or name in sizes or not value.isdigit() or int(value) < 1:
            raise UserError(
                f"mesh {text!r}: expected axis=size pairs such as fsdp=4,tp=2, axes "
                f"{', '.join(AXES)}, each once and at least 1; got {part.strip()!r}"
            )
        sizes[name] = int(value)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of :data:`AXES`, all of type Auto, over all devices.

    Devices are ordered so that ``tp``, and then ``fsdp``, gets the nearest ones. The
    default is all devices of this job; a topology's devices work too.

    Raises:
      UserError: for a bad string (see :func:`parse_mesh`), or sizes whose product is
        not the number of devices.
    """
    sizes = parse_mesh(text)
    devices = list(jax.devices() if devices is None else devices)
    count, have = math.prod(sizes.values()), len(devices)
    if count != have:
        raise UserError(_wrong_count(text, sizes, count, have))
    shape = tuple(sizes.values())
    array = mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
    )
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _wrong_count(text: str, sizes: Mapping[str, int], count: int, have: int) -> str:
    if count > have:
        return (
            f"mesh {text!r} needs {count} devices, this job has {have}; make the axes "
            f"smaller, or simulate devices on a CPU with JAX_NUM_CPU_DEVICES={count}"
        )
    rest = {**sizes, "data": sizes["data"] * have // count}
    words = ",".join(f"{axis}={n}" for axis, n in rest.items() if n > 1)
    advice = f", such as {words}" if have % count == 0 else ""
    return (
        f"mesh {text!r} has {count} of this job's {have} devices: expected sizes whose "
        f"product is {have}{advice}"
    )


def mesh_of(hardware: Hardware) -> Mesh | None:
    """The mesh that the settings name; None for one device."""
    wanted = hardware.mesh
    return None if wanted is None else make_mesh(wanted)


def row_parts(mesh: AnyMesh | None) -> int:
    """How many devices share the rows of a batch."""
    return _mesh.parts(ROWS, mesh)


def check_mesh(
    hardware: Hardware, training: Training, config: models.ModelConfig | None = None
) -> None:
    """Refuses a mesh that the batch or the model cannot be split over.

    Args:
      hardware: names the mesh; its devices need not be present.
      training: has the batch size.
      config: of the model, if it is known.

    Raises:
      UserError: if ``data`` times ``fsdp`` does not divide a microbatch, or ``tp`` does
        not divide the heads.
    """
    if hardware.mesh is None:
        return
    sizes = parse_mesh(hardware.mesh)
    rows, parts = math.prod(sizes[axis] for axis in ROWS), hardware.accumulation
    if training.batch_size % (rows * parts):
        raise UserError(
            f"mesh {hardware.mesh!r}: expected a batch_size that data x fsdp = {rows}"
            f"{f' times accumulation = {parts}' if parts > 1 else ''} divides, got "
            f"{training.batch_size}: take a multiple of {rows * parts}"
        )
    if config is not None:
        check_heads(config, sizes)


# --- what is split how ----------------------------------------------------------------


def base_shardings(mesh: AnyMesh, base: PyTree, config: models.ModelConfig) -> PyTree:
    """Shardings of the frozen weights, which may be quantized."""
    return models.named_shardings(models.partition_specs(config), base, mesh)


def state_shardings(mesh: AnyMesh, tree: PyTree, base: PyTree = None) -> PyTree:
    """Shardings of an adapter, a training state or a method's state.

    Only the bases of subspaces, a reference's states and arrays that match a layer's
    weight are split.

    Args:
      mesh: of any devices.
      tree: arrays or shapes, with `Subspace` nodes anywhere.
      base: placed frozen weights. An array with the name and shape of a layer's weight
        (a direction of alignment) is placed like that weight.

    Returns:
      A tree of ``NamedSharding`` like ``tree``.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def basis(leaf: Any) -> NamedSharding:
        layers = (None,) * (leaf.ndim - 2)
        spec = fit_spec(PartitionSpec(*layers, AXES), leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    weights = {} if base is None else base["layers"]

    def states(leaf: Any) -> NamedSharding:
        # By width: a step draws any of the examples, and each device reads its columns.
        spec = fit_spec(PartitionSpec(None, None, AXES), np.shape(leaf), mesh)
        return NamedSharding(mesh, spec)

    def like_weight(path: Any, leaf: Any) -> NamedSharding:
        if path and path[-1] == REFERENCE and np.ndim(leaf) == 3:
            return states(leaf)
        for step in reversed(path):
            own = weights.get(jax.tree_util.keystr((step,), simple=True))
            if own is not None and own.shape == np.shape(leaf):
                return getattr(own, "sharding", None) or whole
        return whole

    def one(path: Any, node: Any) -> Any:
        if not isinstance(node, Subspace):
            return like_weight(path, node)
        placed = jax.tree.map(lambda leaf: whole, node)
        return Subspace(
            jax.tree.map(basis, node.basis),
            placed.eigenvalues,
            placed.trace,
            node.fingerprint,
        )

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda node: isinstance(node, Subspace)
    )


def batch_shardings(mesh: AnyMesh, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Shardings of a batch in any layout of :mod:`sbr_jax.data.layout`: by rows.

    Microbatches that were packed separately have an axis before the rows. In packed
    batches, arrays with one entry per example stay whole: an example may be in any row.
    """
    packed = "segments" in batch
    stacked = packed and np.ndim(batch["tokens"]) > 2
    by_row = {"tokens", "positions", "segments", "pairs"}
    by_row |= {"places", "targets", "shares", "owners"}

    def one(name: str, leaf: Any) -> NamedSharding:
        if packed and name not in by_row:
            return NamedSharding(mesh, PartitionSpec())
        spec = PartitionSpec(None, ROWS) if stacked else PartitionSpec(ROWS)
        return NamedSharding(mesh, fit_spec(spec, np.shape(leaf), mesh))

    return {name: one(name, leaf) for name, leaf in batch.items()}


def shapes(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes with shardings instead of arrays, to compile ahead of time."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        shardings,
    )


# --- putting arrays there -------------------------------------------------------------


def place_base(mesh: Mesh | None, base: PyTree, config: Any) -> PyTree:
    """Places the frozen weights on the mesh; without one, returns them unchanged."""
    if mesh is None:
        return base
    return jax.tree.map(place, base, base_shardings(mesh, base, config))


def place_state(mesh: Mesh | None, tree: PyTree, base: PyTree = None) -> PyTree:
    """Places every array of an adapter or a state on the mesh, over all hosts.

    Plain numbers, as in diagnostics, stay unchanged; see `state_shardings`.
    """
    if mesh is None:
        return tree

    def one(leaf: Any, sharding: NamedSharding) -> Any:
        arrays = isinstance(leaf, jax.Array | np.ndarray)
        return place(leaf, sharding) if arrays else leaf

    return jax.tree.map(one, tree, state_shardings(mesh, tree, base))


def place_batch(mesh: Mesh | None, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Splits the rows of a batch over the mesh; all hosts hold the same batch."""
    if mesh is None:
        return batch
    found = batch_shardings(mesh, batch)
    return {name: place(x, found[name]) for name, x in batch.items()}


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Places an array with a sharding, which may span hosts.

    The devices themselves move an array that already lies on the mesh. Any other array
    must be the same on every host, and each host gives its own devices their part.
    Hosts are not compared.
    """
    if isinstance(array, jax.Array):
        if array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        if array.sharding.device_set == sharding.device_set:
            return moved(sharding)(array)
    if jnp.issubdtype(getattr(array, "dtype", np.float32), jax.dtypes.prng_key):
        data = place(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


@functools.lru_cache(maxsize=256)
def moved(sharding: NamedSharding) -> Any:
    """The compiled function that copies one array to a sharding."""
    return jax.jit(jnp.copy, out_shardings=sharding)

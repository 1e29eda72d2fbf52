"""Placement of weights on a mesh with the axes ``("data", "fsdp", "tp")``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sbr_jax import _mesh
from sbr_jax.models.codes import QuantisedWeight, is_quantised
from sbr_jax.models.config import BIASED, ModelConfig
from sbr_jax.models.parameters import base_shapes, bias_of
from sbr_jax.typing import PyTree, UserError

_COLUMN = P(None, "fsdp", "tp")
_ROW = P(None, "tp", "fsdp")
_LAYER = {
    "q_proj": _COLUMN,
    "k_proj": _COLUMN,
    "v_proj": _COLUMN,
    "o_proj": _ROW,
    "gate_proj": _COLUMN,
    "up_proj": _COLUMN,
    "down_proj": _ROW,
}
_BIASES = {bias_of(name) for name in BIASED}
_ASKED = ("q_proj", "k_proj", "v_proj")


def partition_specs(config: ModelConfig) -> dict[str, Any]:
    """A tree like ``base`` with one ``PartitionSpec`` per weight.

    Projections into heads or the MLP split their outputs over ``tp``; projections back
    split their inputs. The other axis is split over ``fsdp``. A bias is split like its
    projection's outputs, and norms are whole everywhere. Nothing is split over
    ``data``.

    >>> config = ModelConfig(vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> tuple(partition_specs(config)["layers"]["o_proj"])
    (None, 'tp', 'fsdp')
    """
    layers = {
        name: P(None, "tp") if name in _BIASES else _LAYER.get(name, P())
        for name in base_shapes(config)["layers"]
    }
    specs = {"embed": P("tp", "fsdp"), "layers": layers, "final_norm": P()}
    return specs if config.tied else {**specs, "head": P("fsdp", "tp")}


def adapter_partition_specs(adapter: PyTree) -> PyTree:
    """A tree like ``adapter`` with one ``PartitionSpec`` per factor: whole everywhere.

    An adapter is small, and if it were split, a scan over layers would gather its whole
    stack in every iteration.
    """
    return jax.tree.map(lambda factor: P(), adapter)


def check_heads(
    config: ModelConfig, mesh: Mesh | AbstractMesh | Mapping[str, int]
) -> None:
    """Refuses a mesh whose ``tp`` does not divide the heads.

    Args:
      config: the model's settings.
      mesh: the mesh, or its sizes by axis.
    """
    sizes = mesh if isinstance(mesh, Mapping) else mesh.shape
    count, heads, groups = sizes.get("tp", 1), config.heads, config.kv_heads
    if heads % count or groups % count:
        fit = [n for n in range(1, groups + 1) if heads % n == 0 and groups % n == 0]
        raise UserError(
            f"mesh: expected tp to divide the model's {heads} query and {groups} "
            f"key/value heads, got tp={count}: choose one of {', '.join(map(str, fit))}"
        )


def fit_spec(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Drops the axes of a specification that do not divide or do not exist.

    Returns:
      A specification that ``NamedSharding(mesh, .)`` accepts for this shape.

    >>> mesh = AbstractMesh((2, 4), ("fsdp", "tp"))
    >>> tuple(fit_spec(P(("fsdp", "tp"), "tp"), (6, 8), mesh))
    ('fsdp', 'tp')
    """
    axes = []
    for size, axis in zip(shape, tuple(spec) + (None,) * len(shape), strict=False):
        wanted = (axis,) if isinstance(axis, str) else axis or ()
        fitted = _mesh.dividing(size, mesh, wanted)
        axes.append(fitted[0] if len(fitted) == 1 else fitted or None)
    return P(*axes)


def named_shardings(specs: PyTree, tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """``NamedSharding`` for each array of a tree; see ``fit_spec``.

    Codes and scales of a quantised weight follow the weight's specification, except for
    an axis that would split a block.

    Args:
      specs: tree of ``PartitionSpec``.
      tree: arrays, weights in codes (or anything with a shape) in the same structure.
      mesh: the mesh to place them on.

    Returns:
      A tree of shardings, for ``jax.device_put`` or ``jit``.
    """

    def one(spec: P, leaf: Any) -> Any:
        if is_quantised(leaf):
            whole = fit_spec(spec, leaf.grid, mesh)
            return jax.tree.map(functools.partial(one, whole), leaf)
        shape = leaf if isinstance(leaf, tuple) else leaf.shape
        return NamedSharding(mesh, fit_spec(spec, shape, mesh))

    return jax.tree.map(one, specs, tree, is_leaf=lambda node: isinstance(node, P))


def gathered(
    name: str, weight: jax.Array | QuantisedWeight
) -> jax.Array | QuantisedWeight:
    """One layer's weight (or its codes) ready to multiply: whole except over ``tp``.

    This is where FSDP gathers: one layer at a time, only while that layer runs.

    Args:
      name: the projection's name.
      weight: ``[in, out]``.
    """
    keep = [axis if axis == "tp" else None for axis in _LAYER[name][1:]]
    if not isinstance(weight, QuantisedWeight):
        return _mesh.constrain(weight, *keep)
    mesh = _mesh.current()
    if mesh is None:
        return weight
    whole = fit_spec(P(*keep), weight.grid, mesh)
    return jax.tree.map(lambda part: _mesh.constrain(part, *whole), weight)


def gathering(name: str, tokens: int) -> Any:
    """`gathered` for a projection, or None if nothing is to be gathered.

    Nothing is gathered without a mesh, or for single tokens, where a weight is larger
    than its input.
    """
    if _mesh.current() is None or tokens == 1:
        return None
    return functools.partial(gathered, name)


def gathered_vocabulary(name: str, weight: jax.Array) -> jax.Array:
    """The embedding ``[V, D]`` or the head ``[D, V]``: whole except V over ``tp``."""
    return _mesh.constrain(weight, *(("tp", None) if name == "embed" else (None, "tp")))


# --- single tokens --------------------------------------------------------------------


def stream(x: jax.Array) -> jax.Array:
    """Places the residual stream ``[B, T, D]``: rows over ``data`` and ``fsdp``.

    A single token of each row is smaller than any weight, so then no weight moves: rows
    lie over ``data`` alone and D over ``fsdp``, like that dimension of the weights. A
    product is then a sum over devices of their parts.
    """
    if x.shape[1] > 1:
        return _mesh.constrain_rows(x)
    return _mesh.constrain(x, "data", None, "fsdp")


def entering(name: str, x: jax.Array) -> jax.Array:
    """Places a projection's input; single tokens go where its weight's inputs lie."""
    if x.shape[1] > 1:
        return x
    return _mesh.constrain(x, "data", None, _LAYER[name][1])


def leaving(name: str, y: jax.Array) -> jax.Array:
    """Places a projection's output; single tokens, where its weight's outputs lie.

    Queries, keys and values go to the devices that hold their rows' cache.
    """
    if y.shape[1] > 1:
        return y
    rows = _mesh.ROWS if name in _ASKED else "data"
    return _mesh.constrain(y, rows, None, _LAYER[name][2])

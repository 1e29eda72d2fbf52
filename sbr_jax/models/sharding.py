"""Placement of weights on a mesh with the axes ``("fsdp", "tp")``."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sbr_jax.models.codes import is_quantised
from sbr_jax.models.config import BIASED, ModelConfig
from sbr_jax.models.parameters import base_shapes, bias_of
from sbr_jax.typing import PyTree

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


def partition_specs(config: ModelConfig) -> dict[str, Any]:
    """A tree like ``base`` with one ``PartitionSpec`` per weight.

    Projections into heads or the MLP split their outputs over ``tp``, projections back
    split their inputs; the other axis is split over ``fsdp``. A bias is split like its
    projection's outputs, and norms are whole everywhere.

    Args:
      config: of the model.

    Returns:
      The tree of specifications.

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
    """A tree like ``adapter`` with one ``PartitionSpec`` per factor.

    The layer axis is split over ``fsdp``: layers are independent units, so subspaces
    and their optimizer state follow the same axis.

    Args:
      adapter: ``{name: LoraPair}``.

    Returns:
      The tree of specifications.
    """
    return jax.tree.map(lambda factor: P("fsdp", None, None), adapter)


def fit_spec(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The specification without the axes that do not divide or do not exist.

    Args:
      spec: wanted.
      shape: of the array.
      mesh: at hand.

    Returns:
      A specification that ``NamedSharding(mesh, .)`` accepts for this shape.
    """
    axes = []
    for size, axis in zip(shape, tuple(spec) + (None,) * len(shape), strict=False):
        usable = axis in mesh.shape and size % mesh.shape[axis] == 0
        axes.append(axis if axis is not None and usable else None)
    return P(*axes)


def named_shardings(specs: PyTree, tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """``NamedSharding`` for each array of a tree; see ``fit_spec``.

    Codes and scales of a quantised weight follow the weight's specification, without
    an axis that would split a block.

    Args:
      specs: tree of ``PartitionSpec``.
      tree: arrays, weights in codes (or anything with a shape) in the same structure.
      mesh: at hand.

    Returns:
      A tree of shardings, to be used with ``jax.device_put`` or ``jit``.
    """

    def one(spec: P, leaf: Any) -> Any:
        if is_quantised(leaf):
            whole = fit_spec(spec, leaf.grid, mesh)
            return jax.tree.map(functools.partial(one, whole), leaf)
        shape = leaf if isinstance(leaf, tuple) else leaf.shape
        return NamedSharding(mesh, fit_spec(spec, shape, mesh))

    return jax.tree.map(one, specs, tree, is_leaf=lambda node: isinstance(node, P))

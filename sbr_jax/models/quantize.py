"""A quantised base: the projections of a model in 4 or 8 bits.

Embedding, head, norms and biases stay as they are: they are a small part of a large
model, and the embedding and head decide its tokens. The codes are frozen; training
changes an adapter beside them (QLoRA, arXiv:2305.14314). See ``codes`` for the formats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sbr_jax.models.codes import (
    BLOCK,
    QuantisedWeight,
    as_dense,
    check_kind,
    encode_stack,
    is_quantised,
)
from sbr_jax.models.config import TARGETS, ModelConfig
from sbr_jax.models.parameters import base_shapes, is_shape, select_targets
from sbr_jax.typing import PyTree, UserError


@runtime_checkable
class _Record(Protocol):
    """A dataclass that holds base weights, such as ``Model``."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    params: PyTree


def quantize(
    model: Any, kind: str = "nf4", *, targets: str = ".*", block: int = BLOCK
) -> Any:
    """Encodes the projections of a model or of its base weights.

    The dense weights stay alive as long as the caller holds them;
    ``load(folder, quantize=kind)`` never holds them all.

    Args:
      model: a ``Model``, or a tree of base weights.
      kind: ``"nf4"``, ``"nf4-double"`` or ``"int8"``.
      targets: regular expression over whole projection names; all by default.
      block: inputs that share a scale (nf4 only).

    Returns:
      A copy with a ``QuantisedWeight`` for each target.

    Raises:
      UserError: for an unknown kind, targets that match nothing or are already in
        codes, or weights that are not finite.

    >>> import jax
    >>> from sbr_jax import models
    >>> config = models.ModelConfig(
    ...     vocab_size=8, width=64, mlp_width=64, layers=2, heads=2)
    >>> base = quantize(models.init_params(jax.random.key(0), config), "int8")
    >>> base["layers"]["q_proj"].shape, base["layers"]["q_proj"].codes.dtype
    ((2, 64, 64), dtype('int8'))
    """
    if not isinstance(model, Mapping):
        params = quantize(model.params, kind, targets=targets, block=block)
        return dataclasses.replace(model, params=params)
    check_kind(kind, block)
    names = select_targets(targets)
    require_dense({name: model["layers"][name] for name in names}, "quantize")
    base = _encoded(model, kind, names, block)
    for name in names:
        check_finite(name, base["layers"][name])
    return base


def _encoded(base: PyTree, kind: str, names: tuple[str, ...], block: int) -> PyTree:
    layers = base["layers"]
    codes = {name: encode_stack(layers[name], kind, block) for name in names}
    return {**base, "layers": {**layers, **codes}}


def dequantize(model: Any) -> Any:
    """The dense arrays that codes stand for, in the dtype they had before.

    **Guarantee**: the logits of the result equal those of ``model`` up to float
    rounding; what quantising rounded away does not come back.

    Args:
      model: a ``Model``, or any tree of weights.

    Returns:
      A copy without codes; other arrays are shared, not copied.
    """
    if isinstance(model, _Record):
        return dataclasses.replace(model, params=dequantize(model.params))
    return jax.tree.map(as_dense, model, is_leaf=is_quantised)


def require_dense(
    base: PyTree,
    who: str,
    remedy: str = "load without quantize=, or pass models.dequantize(base)",
) -> None:
    """Refuses weights in codes.

    Args:
      base: a tree of weights.
      who: the caller, for the message.
      remedy: what to do instead, for the message.
    """
    leaves = jax.tree_util.tree_leaves_with_path(base, is_leaf=is_quantised)
    found = {_name(path): leaf.kind for path, leaf in leaves if is_quantised(leaf)}
    if found:
        kinds = " and ".join(sorted(set(found.values())))
        raise UserError(
            f"{who}: expected dense weights, got {kinds} codes in "
            f"{', '.join(found)}; {remedy}"
        )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True) or "the weight"


def check_finite(name: str, weight: QuantisedWeight) -> None:
    """Refuses codes of weights that were not finite, which shows in their scales.

    Raises:
      UserError: naming the weight (not while tracing).
    """
    scales = [x for x in jax.tree.leaves(weight.scales) if x.dtype == jnp.float32]
    if any(isinstance(x, Tracer) for x in scales):
        return
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in scales):
        raise UserError(
            f"quantize: {name} holds a weight that is not finite; one such weight "
            "spoils its whole block, so repair the checkpoint first"
        )


def weight_bytes(
    config: ModelConfig, dtype: Any = jnp.bfloat16, quantize: str | None = None
) -> int:
    """Bytes of a model's base weights; nothing is allocated.

    **Guarantee**: equals the summed ``nbytes`` of the tree that ``load`` gives with
    this ``dtype`` and ``quantize`` on one device.

    Args:
      config: the model's settings.
      dtype: of the weights that are not in codes.
      quantize: the kind of codes for all projections, or None.

    >>> config = ModelConfig(vocab_size=8, width=64, mlp_width=64, layers=2, heads=2)
    >>> weight_bytes(config), weight_bytes(config, quantize="nf4")
    (116352, 33920)
    """
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        base_shapes(config),
        is_leaf=is_shape,
    )
    if quantize is not None:
        check_kind(quantize)
        tree = jax.eval_shape(
            lambda base: _encoded(base, quantize, TARGETS, BLOCK), tree
        )
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

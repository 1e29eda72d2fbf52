"""Weights as 4- or 8-bit codes with scales, decoded where they are multiplied.

A block is a run of consecutive inputs of one output; a is its largest absolute weight:

    nf4    W = a · level[code]       a per block of b = 64 inputs, 16 levels
    int8   W = a / 127 · code        a per output, code in -127 .. 127

The NF4 levels are quantiles of a normal distribution, scaled to [-1, 1], with an
exact zero. Two codes share a byte: inputs 2i (high half) and 2i + 1 (low half). In
``"nf4-double"`` the scales a are themselves 8-bit codes around their mean, with one
float32 for each group of 256 outputs.

int8 is the weight half of LLM.int8(). Its treatment of outliers is left out: those are
outliers of activations, which stay in floating point here.

Bytes per weight, if the blocks are full: nf4 0.5625, nf4-double 0.516, int8 1.

Legend: L layers, b inputs of a block, n blocks of an output, g groups of outputs.

References: arXiv:2305.14314 (NF4 and double quantisation), arXiv:2208.07339 (int8).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.typing import UserError

KINDS = ("nf4", "nf4-double", "int8")
"""The kinds of codes."""

BLOCK = 64
GROUP = 256

_STATIC = {"static": True}


def nf4_levels() -> tuple[float, ...]:
    """The 16 values of NF4, from -1 to 1, in ascending order.

    With Q the quantile function of N(0, 1) and δ = (1/30 + 1/32) / 2: Q at 8 evenly
    spaced probabilities from δ to 1/2, and at 9 from 1/2 to 1 - δ, sharing the zero,
    all divided by Q(1 - δ).

    >>> [round(level, 3) for level in nf4_levels()[5:9]]
    [-0.185, -0.091, 0.0, 0.08]
    """
    tail = (1 / 30 + 1 / 32) / 2
    quantile = statistics.NormalDist().inv_cdf
    below = [quantile(p) for p in np.linspace(tail, 0.5, 8)[:-1]]
    above = [-quantile(p) for p in np.linspace(tail, 0.5, 9)[:-1]]
    return tuple(x / -below[0] for x in [*below, 0.0, *reversed(above)])


_LEVELS = np.asarray(nf4_levels(), np.float32)
_MIDPOINTS = (_LEVELS[1:] + _LEVELS[:-1]) / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DoubleScales:
    """Scales of blocks in 8 bits: ``mean + step · code``."""

    codes: jax.Array
    """int8 ``[L, n, out]``."""
    steps: jax.Array
    """float32 ``[L, n, g]``, one for each group of 256 outputs."""
    mean: jax.Array
    """float32 ``[L, 1, 1]``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A stack of frozen matrices in codes, standing in for an array ``[L, in, out]``.

    Every array inside keeps the layer axis in front and the order (input, output)
    behind it, so that a scan over layers, ``jax.tree`` functions and ``device_put``
    treat it like the array it stands for. Inputs that do not fill the last block are
    padded with zeros, which are never read.

    >>> import jax, jax.numpy as jnp
    >>> weight = encode(jnp.ones((128, 3), jnp.bfloat16), "nf4")
    >>> weight.shape, weight.codes.shape, weight.scales.shape, weight.nbytes
    ((128, 3), (64, 3), (2, 3), 216)
    """

    codes: jax.Array
    """nf4: uint8 ``[L, n · b / 2, out]``, two inputs a byte; int8 ``[L, in, out]``."""
    scales: Any
    """float32 ``[L, n, out]`` (nf4) or ``[L, 1, out]`` (int8), or ``DoubleScales``."""
    kind: str = dataclasses.field(metadata=_STATIC)
    inputs: int = dataclasses.field(metadata=_STATIC)
    dtype: np.dtype = dataclasses.field(metadata=_STATIC)
    """Dtype of the array it stands for."""
    block: int = dataclasses.field(default=BLOCK, metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        return (*self.codes.shape[:-2], self.inputs, self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes of the array it stands for."""
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self)
        )

    @property
    def grid(self) -> tuple[int, ...]:
        """``shape`` with the inputs counted in blocks, which no shard may split.

        A padded weight counts as one block: otherwise only the last shard would be
        short.
        """
        if self.kind == "int8":
            return self.shape
        blocks = 1 if self.inputs % self.block else self.inputs // self.block
        return (*self.shape[:-2], blocks, self.shape[-1])

    def __getitem__(self, index: Any) -> QuantisedWeight:
        """Some of the layers; ``[...]`` is all."""
        return self if index is ... else jax.tree.map(lambda x: x[index], self)

    def dense(self, dtype: Any = None) -> jax.Array:
        """The decoded weights, computed in float32 and rounded once.

        No gradient flows to codes or scales.

        Args:
          dtype: of the result; None keeps that of the array it stands for.
        """
        dtype = self.dtype if dtype is None else dtype
        scales = jax.lax.stop_gradient(_scales(self.scales))
        if self.kind == "int8":
            return (self.codes.astype(jnp.float32) * scales).astype(dtype)
        *lead, half, outputs = self.codes.shape
        halves = jnp.stack([self.codes >> 4, self.codes & 15], axis=-2)
        blocks = halves.reshape(*lead, 2 * half // self.block, self.block, outputs)
        levels = jnp.asarray(_LEVELS).at[blocks].get(mode="promise_in_bounds")
        values = (levels * scales[..., None, :]).astype(dtype)
        return values.reshape(*lead, 2 * half, outputs)[..., : self.inputs, :]


def is_quantised(node: Any) -> bool:
    """True for a weight in codes; use it as ``is_leaf``.

    >>> is_quantised(None)
    False
    """
    return isinstance(node, QuantisedWeight)


def as_dense(weight: jax.Array | QuantisedWeight, dtype: Any = None) -> jax.Array:
    """The weight as an array, decoded if it is in codes.

    Args:
      weight: ``[..., in, out]``.
      dtype: of the result; None keeps the weight's.

    Returns:
      The array. Codes are decoded; arrays are only converted.
    """
    if isinstance(weight, QuantisedWeight):
        return weight.dense(dtype)
    return weight if dtype is None else weight.astype(dtype)


def check_kind(kind: str, block: int = BLOCK) -> None:
    """Refuses an unknown kind of codes or an odd block."""
    if kind not in KINDS:
        raise UserError(f"quantize: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(block, int) or block < 2 or block % 2:
        raise UserError(f"block: expected an even number of inputs, got {block!r}")


@functools.partial(jax.jit, static_argnames=("kind", "block"))
def encode(weight: jax.Array, kind: str, block: int = BLOCK) -> QuantisedWeight:
    """Encodes one matrix, each weight as its nearest level.

    **Guarantee**: with a the largest absolute weight of a block (of an output for
    int8), ``|W - dense|`` is at most ``0.152 a`` for nf4, half the widest gap between
    levels, and ``a / 254`` for int8, plus float32 rounding; zeros stay zeros.

    Args:
      weight: ``[in, out]``, of any float dtype.
      kind: one of ``KINDS``.
      block: inputs that share a scale; even. int8 ignores it.

    Returns:
      The weight in codes, without a layer axis.
    """
    check_kind(kind, block)
    wide = weight.astype(jnp.float32)
    if kind == "int8":
        codes, scales = _round_int8(wide, axis=0)
    else:
        codes, scales = _encode_nf4(wide, block)
        scales = _double(scales) if kind == "nf4-double" else scales
    return QuantisedWeight(codes, scales, kind, len(weight), weight.dtype, block)


def encode_stack(weight: jax.Array, kind: str, block: int = BLOCK) -> QuantisedWeight:
    """Encodes ``[L, in, out]`` layer by layer."""
    layers = range(weight.shape[0])
    return stack_layers([encode(weight[i], kind, block) for i in layers])


def stack_layers(layers: list[QuantisedWeight]) -> QuantisedWeight:
    """Stacks the codes of single layers to one weight ``[L, in, out]``."""
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def _encode_nf4(wide: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    inputs, outputs = wide.shape
    wide = jnp.pad(wide, ((0, -inputs % block), (0, 0)))
    blocks = wide.reshape(-1, block, outputs)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    unit = blocks / jnp.where(scales > 0, scales, 1.0)[:, None]
    # The level is the number of midpoints passed; one fused loop, no search.
    passed = ((unit > middle).astype(jnp.uint8) for middle in _MIDPOINTS)
    codes = functools.reduce(operator.add, passed)
    codes = codes.reshape(-1, 2, outputs)
    return codes[:, 0] << 4 | codes[:, 1], scales


def _round_int8(wide: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes and steps: ``wide ≈ step · code`` with one step along ``axis``."""
    steps = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / 127.0
    codes = jnp.round(wide / jnp.where(steps > 0, steps, 1.0))
    return codes.astype(jnp.int8), steps


def _double(scales: jax.Array) -> DoubleScales:
    blocks, outputs = scales.shape
    mean = jnp.mean(scales, keepdims=True)
    centred = jnp.pad(scales - mean, ((0, 0), (0, -outputs % GROUP)))
    codes, steps = _round_int8(centred.reshape(blocks, -1, GROUP), axis=2)
    codes = codes.reshape(blocks, -1)[:, :outputs]
    return DoubleScales(codes, steps[..., 0], mean)


def _scales(scales: jax.Array | DoubleScales) -> jax.Array:
    """Scales in float32, decoded if they are in codes."""
    if not isinstance(scales, DoubleScales):
        return scales
    steps = jnp.repeat(scales.steps, GROUP, axis=-1)[..., : scales.codes.shape[-1]]
    return scales.mean + steps * scales.codes.astype(jnp.float32)

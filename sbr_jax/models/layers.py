"""Pure functions of a decoder layer.

Legend: B batch, T queries, S keys, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sbr_jax.models.codes import QuantisedWeight
from sbr_jax.models.config import AttentionKernel, RopeScaling

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Gate activations by their name in ``ModelConfig``."""


def project(
    x: jax.Array,
    weight: jax.Array | QuantisedWeight,
    bias: jax.Array | None = None,
    gather: Callable[[Any], Any] | None = None,
) -> jax.Array:
    """``x W + b``: the only place that multiplies by a projection's weight.

    **Guarantee**: weights in codes are decoded to the dtype of x here and nowhere else.
    The backward pass decodes them again instead of keeping the result. So no more
    layers are dense at a time than one step of the scan unrolls.

    Args:
      x: ``[..., in]``.
      weight: ``[in, out]``, or the same in codes.
      bias: ``[out]``, or None.
      gather: gathers a weight that is split over a mesh, or None; called again in the
        backward pass, like decoding.

    Returns:
      ``[..., out]``.
    """
    coded = isinstance(weight, QuantisedWeight)
    if gather is not None:
        y = _gather_and_multiply(gather, x, weight)
    else:
        y = _decode_and_multiply(x, weight) if coded else x @ weight
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@jax.checkpoint
def _decode_and_multiply(x: jax.Array, weight: QuantisedWeight) -> jax.Array:
    return x @ weight.dense(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=0)
def _gather_and_multiply(
    gather: Callable[[Any], Any], x: jax.Array, weight: jax.Array | QuantisedWeight
) -> jax.Array:
    weight = gather(weight)
    coded = isinstance(weight, QuantisedWeight)
    return x @ (weight.dense(x.dtype) if coded else weight)


def rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, unit_offset: bool = False
) -> jax.Array:
    """Root-mean-square normalisation, computed in float32.

    ``x / sqrt(mean(x²) + eps) · weight``. With ``unit_offset`` the factor is
    ``1 + weight``, applied before rounding to the dtype of ``x`` (as Gemma does).

    Args:
      x: ``[..., D]``.
      weight: ``[D]``.
      eps: added to the mean square.
      unit_offset: whether weights are stored as their distance from one.

    Returns:
      ``[..., D]`` in the dtype of ``x``.

    >>> import jax.numpy as jnp
    >>> rms_norm(jnp.full((1, 4), 3.0), jnp.ones(4), 0.0).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = weight.reshape((1,) * (x.ndim - 1) + (-1,))
    if unit_offset:
        return (wide * scale * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight.astype(x.dtype) * (wide * scale).astype(x.dtype)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Radians per position: ``f_i = theta^(-2i / H)``, stretched by ``scaling``.

    Args:
      head_dim: H.
      theta: the base.
      scaling: see ``RopeScaling``; None leaves f as it is.

    Returns:
      float32 ``[H / 2]``.

    >>> rope_frequencies(4, 100.0, RopeScaling("linear", 2.0)).round(3).tolist()
    [0.5, 0.05000000074505806]
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / theta**exponent
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        return frequency / jnp.asarray(scaling.short, jnp.float32)
    if scaling.kind == "yarn":
        share = _yarn_share(head_dim, theta, scaling)
    else:
        turns = frequency * (scaling.original / (2 * math.pi))
        share = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return frequency * (share + (1.0 - share) / scaling.factor)


def _yarn_share(head_dim: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """Share by index: 1 while it turns ``high`` times or more, 0 from ``low`` on.

    ``turns(i) = original · theta^(-2i / H) / 2π``, solved for i and rounded outwards.
    """

    def index(turns: float) -> float:
        whole = math.log(scaling.original / (turns * 2 * math.pi))
        return head_dim * whole / (2 * math.log(theta))

    first = max(math.floor(index(scaling.high)), 0)
    last = min(math.ceil(index(scaling.low)), head_dim - 1)
    places = jnp.arange(head_dim // 2, dtype=jnp.float32)
    # As in the original code: equal ends are moved slightly apart.
    return 1.0 - jnp.clip((places - first) / ((last - first) or 1e-3), 0.0, 1.0)


def rope_table(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding.

    ``angle[t, i] = positions[t] · f_i`` with the f of ``rope_frequencies``; both are
    multiplied by the ``attention`` of ``scaling``.

    Args:
      positions: integers ``[B, T]`` (or ``[1, T]``).
      head_dim: H.
      theta: the base.
      scaling: how frequencies are stretched, or None.

    Returns:
      Two float32 arrays ``[B, T, 1, H / 2]``.
    """
    frequency = rope_frequencies(head_dim, theta, scaling).reshape(1, 1, 1, -1)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    factor = 1.0 if scaling is None else scaling.attention
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the two halves of each head against each other (half-rotated RoPE).

    Args:
      x: ``[B, T, N, H]``.
      rope: the table of ``rope_table``.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``x``.
    """
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def sees(queries: jax.Array, keys: jax.Array, window: int | None = None) -> jax.Array:
    """Mask of the keys a query may see: not after it, and within the window.

    ``query - window < key <= query``.

    Args:
      queries: integer positions ``[B, T]`` (or ``[1, T]``).
      keys: integer positions ``[B, S]`` (or ``[1, S]``).
      window: how many keys, its own included; None: all.

    Returns:
      bool ``[B, 1, T, S]``.

    >>> import jax.numpy as jnp
    >>> place = jnp.arange(3)[None]
    >>> sees(place, place, 2).astype(int)[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    behind = queries[:, None, :, None] - keys[:, None, None, :]
    return (behind >= 0) & (behind < window) if window else behind >= 0


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """``c · tanh(x / c)``, or ``x`` if the cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    implementation: AttentionKernel | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Grouped-query attention: the only place that calls an attention kernel.

    Args:
      query: ``[B, T, N, H]``.
      key: ``[B, S, K, H]`` with K dividing N.
      value: ``[B, S, K, H]``.
      mask: bool ``[B, 1, T, S]``, or None for causal attention.
      implementation: ``"xla"``, ``"cudnn"`` or None. No kernel caps scores, so a cap
        is always computed by plain products.
      window: of causal attention; a mask must already include it.
      scale: factor of the scores; None is ``H ** -0.5``.
      cap: soft cap of the scores, or None.

    Returns:
      ``[B, T, N, H]``.
    """
    if cap is not None:
        return _capped_attention(query, key, value, mask, window, scale, cap)
    causal = mask is None
    # jax promotes bfloat16 to float32 inside, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=causal,
            scale=scale,
            local_window_size=(window - 1, 0) if window and causal else None,
            implementation=implementation,
        )


def _capped_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    window: int | None,
    scale: float | None,
    cap: float,
) -> jax.Array:
    """``softmax(c · tanh(scale · q kᵀ / c)) v``, scores and softmax in float32."""
    rows, length, heads, size = query.shape
    groups = key.shape[2]
    if mask is None:
        queries, keys = (jnp.arange(x.shape[1])[None] for x in (query, key))
        mask = sees(queries, keys, window)
    query = query.reshape(rows, length, groups, heads // groups, size)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32
    )
    scores = soft_cap(scores * (size**-0.5 if scale is None else scale), cap)
    # Finite, so that a query that sees no key does not become NaN.
    scores = jnp.where(mask[:, :, None], scores, -0.7 * jnp.finfo(jnp.float32).max)
    share = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", share, value)
    return out.reshape(rows, length, heads, size)


def drop(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout: zero with probability ``rate``, else ``x / (1 - rate)``.

    **Guarantee**: the expectation is ``x``; the rate is met to 2^-16 (it takes half the
    random bits of a float comparison, which matters on a CPU).

    Args:
      x: any shape.
      key: a PRNG key.
      rate: in [0, 1), a Python float.

    Returns:
      Like ``x``.
    """
    threshold = round(rate * 65536)
    if threshold <= 0:
        return x
    bits = jax.random.bits(key, x.shape, jnp.uint16)
    kept = x / ((65536 - threshold) / 65536)
    return jnp.where(bits >= threshold, kept, jnp.zeros_like(x))

"""Many endings of one beginning, whose keys and values are cached.

Legend: B sequences, T new tokens, P cached slots, L layers, K key-value heads, H head
size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sbr_jax.models.config import Hardware, ModelConfig
from sbr_jax.models.generate import Cache
from sbr_jax.models.layers import sees
from sbr_jax.models.lora import LoraPair
from sbr_jax.models.parts import (
    attend_as,
    embed_tokens,
    final_norm,
    layer_mask,
    output_logits,
    rope_of,
    sliding_layers,
)
from sbr_jax.models.transformer import build_block, check_adapter, scan_layers
from sbr_jax.typing import PyTree

ExtendFn = Callable[..., tuple[jax.Array, Cache]]
"""``extend_fn(base, adapter, tokens, past, length) -> logits, (keys, values)``."""


def extend(
    config: ModelConfig,
    hardware: Hardware,
    base: PyTree,
    adapter: Mapping[str, LoraPair] | None,
    tokens: jax.Array,
    past: Cache | None = None,
    length: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Logits of tokens that follow cached keys and values.

    Many endings of one prompt cost its beginning once: run it without ``past``, and
    every ending with what that returned.

    **Guarantee**: equals ``forward`` on the whole sequence (up to float rounding); the
    slots of ``past`` from ``length`` on, and right-padding, change nothing.

    Args:
      config: the mathematics.
      hardware: how to carry it out.
      base: the frozen weights.
      adapter: ``{name: LoraPair}``, or None.
      tokens: integers ``[B, T]``, right-padded.
      past: keys and values of the beginning, ``[L, B, P, K, H]`` each; None where the
        sequence begins with ``tokens``.
      length: int32 ``[B]``, how many of the P slots count (None: all).

    Returns:
      float32 logits ``[B, T, V]``, and keys and values ``[L, B, T, K, H]``.
    """
    adapter = check_adapter(config, adapter)
    rows, new = tokens.shape
    if past is None:
        shape = (config.layers, rows, 0, config.kv_heads, config.head_dim)
        nothing = jnp.zeros(shape, base["embed"].dtype)
        past = nothing, nothing
    slots = past[0].shape[2]
    length = jnp.full((rows,), slots, jnp.int32) if length is None else length
    positions = length[:, None] + jnp.arange(new, dtype=jnp.int32)[None]
    rope = rope_of(config, positions)
    places = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (rows, slots))
    # A slot that does not count lies in the future of every query.
    places = jnp.where(places < length[:, None], places, slots + new)
    places = jnp.concatenate([places, positions], axis=1)
    pick = layer_mask(config, functools.partial(sees, positions, places))

    def body(x, layer):
        weights, pairs, (keys, values), slides = layer

        def attention(query, key, value):
            all_keys = jnp.concatenate([keys, key], axis=1)
            all_values = jnp.concatenate([values, value], axis=1)
            out = attend_as(config, query, all_keys, all_values, pick(slides), "xla")
            return out, (key, value)

        return build_block(config, weights)(x, rope, pairs, attention)

    x = embed_tokens(config, base, tokens)
    xs = (base["layers"], adapter, past, sliding_layers(config))
    x, cache = scan_layers(config, hardware, body, x, xs)
    return output_logits(config, base, final_norm(config, base, x)), cache


@functools.lru_cache(maxsize=64)
def make_extend_fn(config: ModelConfig, hardware: Hardware = Hardware()) -> ExtendFn:
    """The pure ``extend_fn(base, adapter, tokens, past, length)`` of a model.

    **Guarantee**: equal settings give the very same function object, as with
    ``make_apply_fn``.

    Args:
      config: the mathematics.
      hardware: how to carry it out.

    Returns:
      ``extend`` with the first two arguments bound.
    """
    return functools.partial(extend, config, hardware)

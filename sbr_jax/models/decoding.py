"""Decodes one more token of each row against cached keys and values.

On accelerators the layers are one rolled loop over a stacked cache. On a CPU that loop
would copy and transpose each layer's cache for every token, which takes two thirds of
the time. So there each layer has its own arrays, laid out as its products read them.
Legend: B batch, S cache slots, L layers, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sbr_jax import _mesh
from sbr_jax.models.config import Hardware, ModelConfig
from sbr_jax.models.layers import soft_cap
from sbr_jax.models.lora import LoraPair
from sbr_jax.models.parts import (
    Flags,
    attend_as,
    embed_tokens,
    final_norm,
    layer_flags,
    layer_rope,
    output_logits,
)
from sbr_jax.models.prefix import Cache
from sbr_jax.models.transformer import build_block, scan_layers
from sbr_jax.typing import PyTree

MOST_COPIED = 4 * 2**30
"""Bytes of layer weights that may exist twice: the compiler of an unrolled loop copies
each layer's out of the stack before the first token."""

LayerCaches = list[tuple[jax.Array, jax.Array]]
"""Keys ``[B, K, H, S]`` and values ``[B, K, S, H]`` of each layer."""


def split_cache(cache: Cache) -> Cache:
    """Splits the rows and heads of keys and values over the mesh in use."""
    spec = (None, _mesh.ROWS, None, "tp", None)
    return jax.tree.map(lambda x: _mesh.constrain(x, *spec), cache)


def open_cache(
    hardware: Hardware, base: PyTree, cache: Cache, slots: int
) -> Cache | LayerCaches:
    """A cache with room for ``slots`` more tokens, laid out for this device.

    One entry for each layer on a single CPU, unless ``hardware.unroll`` asks for a loop
    or the weights are larger than `MOST_COPIED`.
    """
    filling = [(0, 0), (0, 0), (0, slots), (0, 0), (0, 0)]
    keys, values = jax.tree.map(lambda x: jnp.pad(x, filling), cache)
    single = jax.default_backend() == "cpu" and _mesh.current() is None
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base["layers"]))
    if hardware.unroll or not single or weights > MOST_COPIED:
        return split_cache((keys, values))
    pairs = zip(keys.transpose(0, 1, 3, 4, 2), values.swapaxes(2, 3), strict=True)
    return list(pairs)


def next_logits(
    config: ModelConfig,
    hardware: Hardware,
    base: PyTree,
    adapter: Mapping[str, LoraPair],
    token: jax.Array,
    place: jax.Array,
    pick: Callable[[Flags], jax.Array],
    cache: Cache | LayerCaches,
    slot: jax.Array,
) -> tuple[jax.Array, Cache | LayerCaches]:
    """Logits after one more token of each row, and the cache with that token.

    Args:
      config: the mathematics.
      hardware: how to carry it out.
      base: the frozen weights.
      adapter: ``{name: LoraPair}``.
      token: integers ``[B]``.
      place: its place in each row, integers ``[B]``.
      pick: chooses a layer's mask (``layer_mask``).
      cache: a cache made by :func:`open_cache`.
      slot: where the token's keys and values go in the cache.

    Returns:
      float32 ``[B, V]``, and the cache.
    """
    pick_rope = layer_rope(config, place[:, None])
    x = embed_tokens(config, base, token[:, None])
    layers = (base["layers"], adapter, layer_flags(config))
    if isinstance(cache, list):
        caches: LayerCaches = []
        for i, held in enumerate(cache):
            weights, pairs, flags = jax.tree.map(operator.itemgetter(i), layers)
            attention = _attention_of_one(config, held, pick(flags), slot)
            block = build_block(config, weights)
            x, held = block(x, pick_rope(flags), pairs, attention)
            caches.append(held)
        new: Cache | LayerCaches = caches
    else:
        x, new = _rolled(config, hardware, layers, pick_rope, pick, x, cache, slot)
    hidden = final_norm(config, base, x[:, 0])
    return output_logits(config, base, hidden, next_only=True), new


def _attention_of_one(config, held, mask, slot):
    """Attention of one query per row over one layer's cache, to which it adds."""
    zero = jnp.int32(0)
    scale = config.attention_scale or config.head_dim**-0.5

    def attention(query, key, value):
        rows, _, heads, size = query.shape
        own, turned = (zero, zero, zero, slot), key.transpose(0, 2, 3, 1)
        keys = jax.lax.dynamic_update_slice(held[0], turned, own)
        own, turned = (zero, zero, slot, zero), value.swapaxes(1, 2)
        values = jax.lax.dynamic_update_slice(held[1], turned, own)
        groups = keys.shape[1]
        query = query.reshape(rows, groups, heads // groups, size)
        wide = jnp.float32
        scores = jnp.einsum("bkgh,bkhs->bkgs", query, keys, preferred_element_type=wide)
        scores = soft_cap(scores * scale, config.attention_cap)
        share = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1)
        out = jnp.einsum("bkgs,bksh->bkgh", share.astype(values.dtype), values)
        return out.reshape(rows, 1, heads, size), (keys, values)

    return attention


def _rolled(config, hardware, layers, pick_rope, pick, x, cache, slot):
    """All layers as one loop, over a stacked cache."""
    zero = jnp.int32(0)

    def body(carry, layer):
        x, keys, values = carry
        (weights, pairs, flags), i = layer

        def attention(query, key, value):
            start = (i, zero, slot, zero, zero)
            new_keys = jax.lax.dynamic_update_slice(keys, key[None], start)
            new_values = jax.lax.dynamic_update_slice(values, value[None], start)
            # An explicit mask for every query, so cuDNN's rules never apply here.
            mask = pick(flags)
            out = attend_as(config, query, new_keys[i], new_values[i], mask, "xla")
            return out, (new_keys, new_values)

        block = build_block(config, weights)
        x, (keys, values) = block(x, pick_rope(flags), pairs, attention)
        return (x, keys, values), None

    depth = jnp.arange(config.layers, dtype=jnp.int32)
    (x, *cache), _ = scan_layers(config, hardware, body, (x, *cache), (layers, depth))
    return x, split_cache(tuple(cache))

"""Runs many endings of one beginning, whose keys and values are cached.

Legend: B sequences, T new tokens, P cached slots, L layers, K key-value heads, H head
size, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sbr_jax.models.config import Hardware, ModelConfig
from sbr_jax.models.layers import sees
from sbr_jax.models.lora import LoraPair
from sbr_jax.models.parts import (
    attend_as,
    embed_tokens,
    final_norm,
    layer_flags,
    layer_mask,
    layer_rope,
    output_logits,
)
from sbr_jax.models.transformer import (
    build_block,
    check_adapter,
    scan_layers,
    whole_rows,
)
from sbr_jax.typing import PyTree

Cache = tuple[jax.Array, jax.Array]
"""Keys and values, ``[L, B, P, K, H]`` each."""


def extend(
    config: ModelConfig,
    hardware: Hardware,
    base: PyTree,
    adapter: Mapping[str, LoraPair] | None,
    tokens: jax.Array,
    past: Cache | None = None,
    length: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """States of tokens that follow cached keys and values.

    For many endings of one prompt, run the prompt once without ``past``, then every
    ending with the keys and values that this returned.

    **Guarantee**: equals ``hidden_states`` of the whole sequence (up to float
    rounding); right-padding and the slots of ``past`` from ``length`` on change
    nothing.

    Args:
      config: the mathematics.
      hardware: how to carry it out.
      base: the frozen weights.
      adapter: ``{name: LoraPair}``, or None.
      tokens: integers ``[B, T]``, right-padded.
      past: keys and values of the beginning, ``[L, B, P, K, H]`` each; None if the
        sequence begins with ``tokens``.
      length: int32 ``[B]``, how many of the P slots count (None: all).

    Returns:
      The head's input, ``[B, T, D]``, and keys and values ``[L, B, T, K, H]``.
    """
    adapter = check_adapter(config, adapter)
    rows, new = tokens.shape
    slots = 0 if past is None else past[0].shape[2]
    positions = jnp.arange(new, dtype=jnp.int32)[None]
    alone, pick = whole_rows(config, hardware, tokens.shape), None
    if past is not None:
        length = jnp.full((rows,), slots, jnp.int32) if length is None else length
        positions = length[:, None] + positions
        places = jnp.arange(slots, dtype=jnp.int32)[None]
        # A slot that does not count is placed in the future of every query.
        places = jnp.where(places < length[:, None], places, slots + new)
        places = jnp.concatenate([places, positions], axis=1)
        pick = layer_mask(config, functools.partial(sees, positions, places))
    pick_rope = layer_rope(config, positions)

    def body(x, layer):
        weights, pairs, before, flags = layer

        def attention(query, key, value):
            if before is None or pick is None:
                return alone(flags, query, key, value)[0], (key, value)
            keys = jnp.concatenate([before[0], key], axis=1)
            values = jnp.concatenate([before[1], value], axis=1)
            out = attend_as(config, query, keys, values, pick(flags), "xla")
            return out, (key, value)

        return build_block(config, weights)(x, pick_rope(flags), pairs, attention)

    x = embed_tokens(config, base, tokens)
    xs = (base["layers"], adapter, past, layer_flags(config))
    x, cache = scan_layers(config, hardware, body, x, xs)
    return final_norm(config, base, x), cache


@dataclasses.dataclass(frozen=True)
class Extension:
    """A decoder that continues cached keys and values: states, head and logits.

    A caller that needs the logits of some places only applies the head to those states
    of ``hidden``, as with :class:`sbr_jax.models.transformer.Transformer`.
    """

    config: ModelConfig
    """The mathematics."""
    hardware: Hardware = Hardware()
    """How it is carried out."""

    def hidden(
        self,
        base: PyTree,
        adapter: PyTree | None,
        tokens: jax.Array,
        past: Cache | None = None,
        length: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """:func:`extend` of this model."""
        return extend(self.config, self.hardware, base, adapter, tokens, past, length)

    def head(self, base: PyTree, hidden: jax.Array) -> jax.Array:
        """float32 logits ``[..., V]`` of states ``[..., D]``."""
        return output_logits(self.config, base, hidden)

    def __call__(
        self,
        base: PyTree,
        adapter: PyTree | None,
        tokens: jax.Array,
        past: Cache | None = None,
        length: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits ``[B, T, V]`` of all new tokens, and their keys and values."""
        hidden, cache = self.hidden(base, adapter, tokens, past, length)
        return self.head(base, hidden), cache


@functools.lru_cache(maxsize=64)
def make_extend_fn(config: ModelConfig, hardware: Hardware = Hardware()) -> Extension:
    """The pure ``extend_fn(base, adapter, tokens, past, length)`` of a model.

    **Guarantee**: equal settings give the very same function object, as with
    ``make_apply_fn``.

    Returns:
      The function, which also has ``hidden`` and ``head``.
    """
    return Extension(config, hardware)

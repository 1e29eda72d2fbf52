"""Pure functions around the layers of a decoder: embedding, masks, head.

Training, generation and cached prefixes walk through the layers in their own ways, but
share these parts, so that no family is half supported.

Legend: B batch, T queries, S keys, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sbr_jax.models.config import AttentionKernel, ModelConfig
from sbr_jax.models.layers import attend, rms_norm, rope_table, soft_cap
from sbr_jax.typing import PyTree


def embed_tokens(
    config: ModelConfig,
    base: PyTree,
    tokens: jax.Array,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Input of the first layer, ``[B, T, D]``: embeddings, scaled where that is due.

    Args:
      config: of the model.
      base: its weights.
      tokens: integers ``[B, T]``.
      rows: ``[B, T, D]`` in the place of the tokens' rows of the embedding, or None.
    """
    if rows is None:
        rows = jnp.take(base["embed"], tokens, axis=0, mode="clip")
    if not config.scaled_embedding:
        return rows
    # The root is rounded to the weights' dtype first: these models were trained so.
    return rows * jnp.asarray(math.sqrt(config.width), rows.dtype)


def final_norm(config: ModelConfig, base: PyTree, x: jax.Array) -> jax.Array:
    """The norm between the last layer and the head."""
    return rms_norm(x, base["final_norm"], config.norm_eps, config.unit_offset)


def output_logits(config: ModelConfig, base: PyTree, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states after the final norm.

    Args:
      config: of the model.
      base: its weights.
      hidden: ``[..., D]``.

    Returns:
      float32 ``[..., V]``.
    """
    head = base["embed"] if config.tied else base["head"]
    spec = "...d,vd->...v" if config.tied else "...d,dv->...v"
    logits = jnp.einsum(spec, hidden, head, preferred_element_type=jnp.float32)
    return soft_cap(logits, config.logit_cap)


def rope_of(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The table of ``rope_table`` for positions ``[B, T]`` of this model."""
    return rope_table(
        positions, config.head_dim, config.rope_theta, config.rope_scaling
    )


def attend_as(
    config: ModelConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    implementation: AttentionKernel | None,
) -> jax.Array:
    """``attend`` with the window, scale and cap of the model."""
    return attend(
        query,
        key,
        value,
        mask,
        implementation,
        window=config.window,
        scale=config.attention_scale,
        cap=config.attention_cap,
    )


def sliding_layers(config: ModelConfig) -> jax.Array | None:
    """Flags of sliding layers, bool ``[L]``, to scan over; None if all are alike."""
    return jnp.asarray(config.sliding) if config.alternates else None


def layer_mask(
    config: ModelConfig, mask: Callable[[int | None], jax.Array]
) -> Callable[[jax.Array | None], jax.Array]:
    """Chooses a layer's mask; both are built once, outside the scan.

    Args:
      config: of the model.
      mask: ``window -> bool [B, 1, T, S]``.

    Returns:
      ``slides -> mask`` for one entry of ``sliding_layers``.
    """
    if not config.alternates:
        only = mask(config.window)
        return lambda slides: only
    near, full = mask(config.window), mask(None)

    def chosen(slides: jax.Array | None) -> jax.Array:
        assert slides is not None  # ``sliding_layers`` of a model that alternates.
        return jnp.where(slides, near, full)

    return chosen

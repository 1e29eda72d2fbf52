"""Pure functions around the layers of a decoder: embedding, masks, head.

Training, generation and cached prefixes each walk through the layers in their own way,
but share these parts, so that all of them support a family alike.

Legend: B batch, T queries, S keys, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sbr_jax import _mesh
from sbr_jax.models.config import AttentionKernel, ModelConfig
from sbr_jax.models.layers import attend, rms_norm, rope_table, soft_cap
from sbr_jax.models.sharding import gathered_vocabulary, stream
from sbr_jax.typing import PyTree, UserError

Rope = tuple[jax.Array, jax.Array]
"""Cosines and sines of ``rope_table``."""

Flags = Mapping[str, jax.Array | None]
"""The entries of ``layer_flags`` for one layer."""


def embed_tokens(
    config: ModelConfig,
    base: PyTree,
    tokens: jax.Array,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Input of the first layer, ``[B, T, D]``: embeddings, scaled if the family does.

    Args:
      config: the model's settings.
      base: its weights.
      tokens: integers ``[B, T]``.
      rows: ``[B, T, D]`` to use instead of the tokens' embeddings, or None.
    """
    if rows is None:
        embed = base["embed"]
        if tokens.shape[1] > 1:
            embed = gathered_vocabulary("embed", embed)
        rows = jnp.take(embed, tokens, axis=0, mode="clip")
    rows = stream(rows)
    scale = config.embedding_multiplier
    scale *= math.sqrt(config.width) if config.scaled_embedding else 1.0
    # Round the root to the weights' dtype first: the models were trained this way.
    return rows if scale == 1.0 else rows * jnp.asarray(scale, rows.dtype)


def final_norm(config: ModelConfig, base: PyTree, x: jax.Array) -> jax.Array:
    """The norm between the last layer and the head."""
    return rms_norm(x, base["final_norm"], config.norm_eps, config.unit_offset)


def output_logits(
    config: ModelConfig, base: PyTree, hidden: jax.Array, *, next_only: bool = False
) -> jax.Array:
    """Logits of hidden states after the final norm.

    Args:
      config: the model's settings.
      base: its weights.
      hidden: ``[..., D]``.
      next_only: whether ``hidden`` is one state of each row, ``[B, D]``; then the head
        stays where it lies on a mesh.

    Returns:
      float32 ``[..., V]``.
    """
    name = "embed" if config.tied else "head"
    head = base[name]
    if next_only:
        hidden = _mesh.constrain(hidden, "data", "fsdp")
    else:
        head = gathered_vocabulary(name, head)
    spec = "...d,vd->...v" if config.tied else "...d,dv->...v"
    logits = jnp.einsum(spec, hidden, head, preferred_element_type=jnp.float32)
    if next_only:
        logits = _mesh.constrain(logits, _mesh.ROWS, "tp")
    else:
        logits = _mesh.constrain_last(logits)
    if config.logit_divisor != 1.0:
        logits = logits / config.logit_divisor
    return soft_cap(logits, config.logit_cap)


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


def layer_flags(config: ModelConfig) -> Flags:
    """How layers differ, to scan over: bool ``[L]`` each.

    ``"slides"`` for a window, ``"turns"`` for RoPE; None if all layers are alike.
    """
    return {
        "slides": jnp.asarray(config.sliding) if config.alternates else None,
        "turns": jnp.asarray(config.rope_layers) if config.rope_layers else None,
    }


def layer_mask(
    config: ModelConfig, mask: Callable[[int | None], jax.Array]
) -> Callable[[Flags], jax.Array]:
    """Chooses a layer's mask; both masks are built once, outside the scan.

    Args:
      config: the model's settings.
      mask: ``window -> bool [B, 1, T, S]``.

    Returns:
      ``flags -> mask`` for one entry of ``layer_flags``.
    """
    if not config.alternates:
        only = mask(config.window)
        return lambda flags: only
    near, full = mask(config.window), mask(None)
    return lambda flags: _where(flags["slides"], near, full)


def layer_rope(config: ModelConfig, positions: jax.Array) -> Callable[[Flags], Rope]:
    """Chooses a layer's RoPE table; all tables are built once, outside the scan.

    Returns:
      ``flags -> (cosines, sines)`` for one entry of ``layer_flags``. A layer without
      RoPE has cosines of one and sines of zero, which leave its input unchanged.

    Raises:
      UserError: for more tokens than a longrope model is defined for.
    """
    scaling, length = config.rope_scaling, positions.shape[1]
    if scaling and scaling.kind == "longrope" and length > scaling.original:
        raise UserError(
            f"expected at most {scaling.original} tokens, for which this model's short "
            f"factors of RoPE hold, got {length}; longer ones would need other keys at "
            "every place, which is not implemented: cut them"
        )
    full = rope_table(positions, config.head_dim, config.rope_theta, scaling)
    near = full
    if config.local_rope_theta is not None:
        near = rope_table(positions, config.head_dim, config.local_rope_theta)
        full = full if config.alternates else near

    def chosen(flags: Flags) -> Rope:
        cos, sin = full
        if config.alternates and near is not full:
            cos, sin = (
                _where(flags["slides"], *x) for x in zip(near, full, strict=True)
            )
        if config.rope_layers:
            cos = _where(flags["turns"], cos, jnp.ones_like(cos))
            sin = _where(flags["turns"], sin, jnp.zeros_like(sin))
        return cos, sin

    return chosen


def _where(flag: jax.Array | None, yes: jax.Array, no: jax.Array) -> jax.Array:
    assert flag is not None  # ``layer_flags`` of a model whose layers differ.
    return jnp.where(flag, yes, no)

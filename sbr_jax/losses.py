"""Losses of a language model: per example, masked, in float32.

Legend: B examples, T tokens, V vocabulary, D width. The logits at position ``t - 1``
predict token ``t``. ``mask[b, t] = 1`` marks token ``t`` as an answer token, so the
first column of a mask never counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sbr_jax import _rows, checks
from sbr_jax.typing import UserError


def _next(values: jax.Array) -> jax.Array:
    """Move every column to the position that predicts it; the last column is zero.

    Shifting these small arrays, rather than slicing the logits, saves a copy of the
    logits.
    """
    return jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)


def _check(name: str, logits: jax.Array, **others: jax.Array) -> None:
    """Refuse arrays that broadcasting or a cast would silently accept.

    Raises:
      UserError: naming the array.
    """
    checks.floating(name, "", logits)
    shape = tuple(logits.shape[:-1])
    if not shape:
        raise UserError(f"expected {name} [B, T, V], got {checks.shown(logits)}")
    for what, array in others.items():
        fits = hasattr(array, "dtype") and tuple(array.shape) == shape
        whole = what == "tokens"
        if not fits or (whole and not checks.has_dtype(array, jnp.integer)):
            raise UserError(
                f"expected {what} to be {'integers ' if whole else ''}{list(shape)}, "
                f"like {name} without the vocabulary, got {checks.shown(array)}"
            )


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis where the mask is set, 0 where it is empty."""
    weights = mask.astype(jnp.float32)
    total = jnp.sum(weights, axis=-1)
    # where() on the values, because 0 * inf would be NaN at a masked position.
    kept = jnp.where(weights > 0, values * weights, jnp.zeros_like(values))
    return jnp.sum(kept, axis=-1) / jnp.maximum(total, 1.0)


def token_log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-likelihood of every token except the first.

    ``log p(tokens[b, t] | tokens[b, :t])`` for t = 1 ... T - 1.

    Args:
      logits: ``[B, T, V]``.
      tokens: integers ``[B, T]``.

    Returns:
      float32 ``[B, T - 1]``.

    Raises:
      UserError: for tokens that are not integers, or shapes that differ.

    >>> import jax.numpy as jnp
    >>> float(token_log_likelihood(jnp.zeros((1, 2, 4)), jnp.array([[0, 1]]))[0, 0])
    -1.3862943649291992
    """
    return _log_likelihood(logits, tokens)[..., :-1]


def _log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-likelihood ``[B, T]`` of the next token; the last column is padding."""
    _check("logits", logits, tokens=tokens)
    return _rows.log_likelihood(logits, _next(tokens))


def token_cross_entropy(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Mean cross-entropy over the answer tokens of each example.

    ``-(1 / |A|) Σ_{t in A} log p(tokens[t])``.

    **Guarantee**: an example whose mask is empty yields 0 and a zero gradient.

    Args:
      logits: ``[B, T, V]``.
      tokens: integers ``[B, T]``.
      mask: ``[B, T]``, 1 at answer tokens (the set A).

    Returns:
      float32 ``[B]``, in nats.

    Raises:
      UserError: for tokens that are not integers, or shapes that differ.

    >>> import jax.numpy as jnp
    >>> logits, tokens = jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]])
    >>> float(token_cross_entropy(logits, tokens, jnp.array([[0.0, 1.0, 1.0]]))[0])
    1.3862943649291992
    >>> float(token_cross_entropy(logits, tokens, jnp.zeros((1, 3)))[0])
    0.0
    """
    _check("logits", logits, mask=mask)
    # 0 - x rather than -x, so that an empty example is 0 and not -0.
    return 0.0 - _masked_mean(_log_likelihood(logits, tokens), _next(mask))


def kl_to_reference(
    ref_logits: jax.Array,
    logits: jax.Array,
    mask: jax.Array,
    *,
    direction: str = "forward",
) -> jax.Array:
    """Mean divergence KL(reference ‖ model) at the answer positions.

    ``(1 / |A|) Σ_{t in A} Σ_v p_ref(v) (log p_ref(v) - log p(v))``, over the whole
    vocabulary, at the positions ``t - 1`` that predict the answer tokens.
    ``direction="reverse"`` gives KL(model ‖ reference).

    **Guarantee**: no gradient flows to the reference; an empty mask yields 0.

    Args:
      ref_logits: ``[B, T, V]`` of the reference.
      logits: ``[B, T, V]`` of the model.
      mask: ``[B, T]``, 1 at answer tokens (the set A).
      direction: ``"forward"``, which penalises missing what the reference would say, or
        ``"reverse"``, which penalises what the reference would not say.

    Returns:
      float32 ``[B]``, in nats. The reverse divergence is infinite if the model gives
      weight to a token that the reference rules out.

    Raises:
      UserError: for another direction, or shapes that differ.

    >>> import jax.numpy as jnp
    >>> logits = jnp.arange(12.0).reshape(1, 3, 4)
    >>> float(kl_to_reference(logits, logits, jnp.ones((1, 3)))[0])
    0.0
    """
    checks.one_of("direction", direction, ("forward", "reverse"))
    _check("logits", logits, mask=mask)
    _check("ref_logits", ref_logits, mask=mask)
    if ref_logits.shape != logits.shape:
        raise UserError(
            "expected ref_logits and logits of one shape, got "
            f"{ref_logits.shape} and {logits.shape}"
        )
    ref_logits = jax.lax.stop_gradient(ref_logits)
    gap = _rows.divergence(ref_logits, logits, direction)
    return _masked_mean(gap, _next(mask))


def hidden_state_anchor(
    hidden: jax.Array, reference: jax.Array, *, reduction: str = "mean"
) -> jax.Array:
    """Squared distance of each hidden state to its reference.

    ``‖h - h_ref‖²`` (``"sum"``) or ``‖h - h_ref‖² / D`` (``"mean"``), where D is the
    number of entries of one example.

    **Guarantee**: no gradient flows to the reference.

    Args:
      hidden: ``[B, ...]``, usually ``[B, D]`` at the last prompt token.
      reference: an array of the same shape.
      reduction: ``"mean"`` or ``"sum"``; the mean is smaller by the factor D.

    Returns:
      float32 ``[B]``.

    Raises:
      UserError: for another reduction, or shapes that differ.

    >>> import jax.numpy as jnp
    >>> hidden, reference = jnp.ones((1, 4)), jnp.zeros((1, 4))
    >>> float(hidden_state_anchor(hidden, reference, reduction="sum")[0])
    4.0
    >>> float(hidden_state_anchor(hidden, reference)[0])
    1.0
    """
    checks.one_of("reduction", reduction, ("mean", "sum"))
    checks.floating("hidden states", "", hidden)
    checks.floating("reference states", "", reference)
    if hidden.shape != reference.shape:
        raise UserError(
            "hidden_state_anchor expected hidden and reference of one shape, got "
            f"{hidden.shape} and {reference.shape}; gather the same positions of both"
        )
    reference = jax.lax.stop_gradient(reference).astype(jnp.float32)
    squared = jnp.square(hidden.astype(jnp.float32) - reference)
    axes = tuple(range(1, squared.ndim))
    reduce = jnp.mean if reduction == "mean" else jnp.sum
    return reduce(squared, axis=axes)

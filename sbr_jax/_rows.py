"""Log-likelihood and divergence of each row of logits, in float32.

The losses apply these functions to whole logits; :mod:`sbr_jax.models.vocabulary`
applies them to a few rows at a time. Legend: V vocabulary, k tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``log p(target)`` of each row of logits ``[..., V]``, float32 ``[...]``."""
    scores = logits.astype(jnp.float32)
    targets = targets[..., None].astype(jnp.int32)
    # Comparing beats gathering: the gradient needs no scatter, and XLA fuses it.
    columns = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    picked = jnp.sum(jnp.where(columns == targets, scores, 0.0), axis=-1)
    return picked - jax.nn.logsumexp(scores, axis=-1)


def divergence(
    reference: jax.Array, logits: jax.Array, direction: str = "forward"
) -> jax.Array:
    """KL(reference ‖ model) of each row of logits ``[..., V]``, float32 ``[...]``."""
    p = jax.nn.log_softmax(reference.astype(jnp.float32))
    q = jax.nn.log_softmax(logits.astype(jnp.float32))
    if direction == "reverse":
        p, q = q, p
    # Where p is 0, exp(-inf) * (-inf - x) would be NaN.
    gap = jnp.where(jnp.isneginf(p), 0.0, p - q)
    return jnp.sum(jnp.exp(p) * gap, axis=-1)


class Top(NamedTuple):
    """The likeliest tokens of rows of logits, and one bucket for all others.

    Attributes:
      tokens: int32 ``[..., k]``, likeliest first.
      probs: float32 ``[..., k]``, their probabilities.
      rest: float32 ``[...]``, the total probability of all other tokens.
    """

    tokens: jax.Array
    probs: jax.Array
    rest: jax.Array


def top(logits: jax.Array, k: int) -> Top:
    """The ``k`` likeliest tokens of each row of logits ``[..., V]``, and the rest."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    kept, tokens = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    probs = jnp.exp(kept)
    known = _marked(scores, tokens, probs) > 0
    return Top(tokens, probs, jnp.exp(_beyond(scores, known)))


def top_divergence(reference: Top, logits: jax.Array) -> jax.Array:
    """KL(reference ‖ model), with all but the reference's top tokens in one bucket.

    ``Σ_top p (log p − log q) + p_rest (log p_rest − log q_rest)``, float32 ``[...]``.

    **Guarantee**: at most the full KL, by the data processing inequality; up to
    rounding, 0 with a zero gradient where the two distributions are equal.
    """
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    p = _marked(scores, reference.tokens, reference.probs)
    known = p > 0
    gap = jnp.where(known, jnp.log(jnp.where(known, p, 1.0)) - scores, 0.0)
    # Without a rest, the log of an empty sum has no gradient, so it is not formed.
    some = reference.rest > 0
    rest = jnp.where(some, reference.rest, 1.0)
    gap_beyond = jnp.log(rest) - _beyond(scores, known & some[..., None])
    return jnp.sum(p * gap, axis=-1) + jnp.where(some, rest * gap_beyond, 0.0)


def _beyond(scores: jax.Array, known: jax.Array) -> jax.Array:
    """Log of the total probability of all columns except the known ones."""
    return jax.nn.logsumexp(jnp.where(known, -jnp.inf, scores), axis=-1)


def _marked(scores: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """Rows shaped like the scores, with values in some columns and 0 elsewhere."""
    whole = jnp.zeros_like(scores)
    return jnp.put_along_axis(whole, columns, values, axis=-1, inplace=False)

"""Log-likelihood and divergence of each row of logits, in float32.

The losses apply them to whole logits, :mod:`sbr_jax.models.vocabulary` to a few rows at
a time. Legend: V vocabulary, k tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``log p(target)`` of each row of logits ``[..., V]``, float32 ``[...]``."""
    scores = logits.astype(jnp.float32)
    targets = targets[..., None].astype(jnp.int32)
    # Comparing beats gathering: its gradient is no scatter, and XLA fuses it.
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
    # exp(-inf) * (-inf - x) is NaN where p rules a token out.
    gap = jnp.where(jnp.isneginf(p), 0.0, p - q)
    return jnp.sum(jnp.exp(p) * gap, axis=-1)


class Top(NamedTuple):
    """The likeliest tokens of rows of logits, and one bucket for all others.

    Attributes:
      tokens: int32 ``[..., k]``, likeliest first.
      log_probs: float32 ``[..., k]``, of these.
      rest: float32 ``[...]``, log of the others' joint probability; -inf if none.
    """

    tokens: jax.Array
    log_probs: jax.Array
    rest: jax.Array


def top(logits: jax.Array, k: int) -> Top:
    """The ``k`` likeliest tokens of each row of logits ``[..., V]``, and the rest."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    kept, tokens = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    return Top(tokens, kept, _beyond(scores, _marked(scores, tokens, True, False)))


def top_divergence(reference: Top, logits: jax.Array) -> jax.Array:
    """KL of two distributions of which all but a reference's top tokens are one bucket.

    ``Σ_top p (log p − log q) + p_rest (log p_rest − log q_rest)``, float32 ``[...]``.

    **Guarantee**: at most KL(reference ‖ model), by the inequality of data processing;
    0 with a zero gradient where the two are equal, up to rounding.
    """
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    told = _marked(scores, reference.tokens, reference.log_probs, -jnp.inf)
    known = ~jnp.isneginf(told)
    gap = jnp.where(known, told - scores, 0.0)
    # Where nothing is left, the sum over nothing has no gradient: it is not formed.
    some = ~jnp.isneginf(reference.rest)
    rest = jnp.where(some, reference.rest, 0.0)
    gap_beyond = rest - _beyond(scores, known & some[..., None])
    inside = jnp.sum(jnp.exp(told) * gap, axis=-1)
    return inside + jnp.where(some, jnp.exp(rest) * gap_beyond, 0.0)


def _beyond(scores: jax.Array, known: jax.Array) -> jax.Array:
    """Log of the joint probability of all columns but the known ones."""
    return jax.nn.logsumexp(jnp.where(known, -jnp.inf, scores), axis=-1)


def _marked(
    scores: jax.Array, columns: jax.Array, values: Any, filling: Any
) -> jax.Array:
    """Rows like the scores that hold values in some columns."""
    values = jnp.broadcast_to(jnp.asarray(values), columns.shape)
    whole = jnp.full(scores.shape, filling, values.dtype)
    return jnp.put_along_axis(whole, columns, values, axis=-1, inplace=False)

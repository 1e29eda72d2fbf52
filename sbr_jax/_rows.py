"""Log-likelihood and divergence of each row of logits, in float32.

The losses apply them to whole logits, :mod:`sbr_jax.models.vocabulary` to a few rows at
a time. Legend: V vocabulary.
"""

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

"""The log-likelihood of answers as a loss: what Fisher estimates differentiate."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sbr_jax import losses
from sbr_jax.typing import ApplyFn


@functools.lru_cache(maxsize=64)
def answer_loss(
    apply_fn: ApplyFn, reduction: str, fisher: str = "empirical"
) -> Callable[..., jax.Array]:
    """−log p(y | x) of one example, as the loss function of a Fisher estimate.

    Cached, so that repeated estimates share one compiled program.

    Args:
      apply_fn: the model.
      reduction: ``"sum"`` over answer tokens (published) or ``"mean"``.
      fisher: ``"empirical"`` takes y from the data; ``"sampled"`` draws every answer
        token from the model, given the data's tokens before it.

    Returns:
      ``loss_fn(adapter, example, base)``, for ``"sampled"`` ``loss_fn(adapter, example,
      key, base)``, with an example of ``tokens [T]`` and ``mask [T]``.
    """

    def total(logits, labels, mask):
        loss = losses.token_cross_entropy(logits, labels, mask)[0]
        return loss * jnp.sum(mask[:, 1:]) if reduction == "sum" else loss

    def empirical(adapter, example, base):
        tokens, mask = example["tokens"][None], example["mask"][None]
        return total(apply_fn(base, adapter, tokens), tokens, mask)

    def sampled(adapter, example, key, base):
        tokens, mask = example["tokens"][None], example["mask"][None]
        logits = apply_fn(base, adapter, tokens)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits[:, :-1]))
        labels = jnp.concatenate([tokens[:, :1], drawn.astype(tokens.dtype)], axis=1)
        return total(logits, labels, mask)

    return sampled if fisher == "sampled" else empirical


__all__ = ["answer_loss"]

"""The log-likelihood of an answer, as the loss that Fisher estimates differentiate."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sbr_jax.models import answers, vocabulary
from sbr_jax.typing import ApplyFn


def answer_loss(
    apply_fn: ApplyFn, reduction: str, fisher: str = "empirical"
) -> Callable[..., jax.Array]:
    """−log p(y | x) of one example, as the loss function of a Fisher estimate.

    Equal settings return the same function object, however they are passed, so that
    estimates and measurements share compiled programs.

    Args:
      apply_fn: the model.
      reduction: ``"sum"`` over answer tokens (published) or ``"mean"``.
      fisher: ``"empirical"`` takes y from the data; ``"sampled"`` draws every answer
        token from the model, given the data's tokens before it.

    Returns:
      ``loss_fn(adapter, example, base)``, or ``loss_fn(adapter, example, key, base)``
      for ``"sampled"``. An example has ``tokens [T]``, ``mask [T]`` and optionally its
      answer places.
    """
    return _made(apply_fn, reduction, fisher)


@functools.lru_cache(maxsize=64)
def _made(apply_fn: ApplyFn, reduction: str, fisher: str) -> Callable[..., jax.Array]:
    head = answers.head_of(apply_fn)

    def total(base, hidden, found, mask):
        loss = answers.cross_entropy(apply_fn, base, hidden, found)[0]
        return loss * jnp.sum(mask[:, 1:]) if reduction == "sum" else loss

    def states(adapter, example, base):
        batch = {name: value[None] for name, value in example.items()}
        hidden = answers.states(apply_fn, base, adapter, batch)
        return hidden, answers.find(batch), batch["mask"]

    def empirical(adapter, example, base):
        return total(base, *states(adapter, example, base))

    def sampled(adapter, example, key, base):
        hidden, found, mask = states(adapter, example, base)
        keys = jax.random.split(key, len(found.targets))
        still = jax.lax.stop_gradient(hidden)
        draw = jax.vmap(lambda logits, k: jax.random.categorical(k, logits))
        drawn = vocabulary.read(head, base, still, draw, keys)
        labels = found._replace(targets=drawn.astype(found.targets.dtype))
        return total(base, hidden, labels, mask)

    return sampled if fisher == "sampled" else empirical

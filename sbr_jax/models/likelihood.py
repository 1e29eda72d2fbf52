"""Log-likelihoods of given answers, one whole sequence each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.losses import token_log_likelihood
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.models.generate import bucket
from sbr_jax.models.loading import Model
from sbr_jax.typing import PyTree, UserError


@functools.partial(jax.jit, static_argnames=("apply_fn",))
def _log_probs(
    apply_fn: Any, base: PyTree, adapter: PyTree, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = apply_fn(base, adapter, tokens)
    scores = token_log_likelihood(logits, tokens)
    told = jnp.all(comparable(logits[:, :-1]) | (mask[:, 1:] == 0), axis=-1)
    return jnp.sum(scores * mask[:, 1:], axis=-1), told


def token_log_probs(
    model: Model,
    base: PyTree,
    adapter: PyTree | None,
    tokens: Any,
    mask: Any,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Summed log-likelihood of each answer given its prompt.

    ``Σ_{t in A} log p(tokens[t] | tokens[:t])``.

    **Guarantee**: at most ``batch_size`` rows are on the device at once.

    Args:
      model: the record.
      base: weights to use.
      adapter: ``{name: LoraPair}`` or None.
      tokens: integers ``[B, T]``, right-padded.
      mask: ``[B, T]``, 1 at answer tokens (the set A).
      batch_size: the most rows in one run.

    Returns:
      float32 ``[B]``, in nats.

    Raises:
      UserError: if the shapes differ, or a log-likelihood is no number.
    """
    tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, np.float32)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise UserError(
            "token_log_probs expected tokens and mask of one shape [B, T], got "
            f"{tokens.shape} and {mask.shape}"
        )
    total = len(tokens)
    out, told = np.zeros(total, np.float32), np.ones(total, bool)
    rows = min(bucket(max(total, 1), 1), batch_size)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        filling = [(0, rows - (stop - start)), (0, 0)]
        part, sure = _log_probs(
            model.apply_fn,
            base,
            adapter,
            np.pad(tokens[start:stop], filling),
            np.pad(mask[start:stop], filling),
        )
        out[start:stop] = np.asarray(part)[: stop - start]
        told[start:stop] = np.asarray(sure)[: stop - start]
    require_comparable("token_log_probs", told & np.isfinite(out))
    return out

"""Losses on held-out token data sets, and data sets of random tokens."""

import functools

import numpy as np

from sbr_jax import models
from sbr_jax.data import TokenDataset
from sbr_jax.evaluation.domain_scores import Remembered
from sbr_jax.models.finite import require_comparable
from sbr_jax.models.likelihood import answer_scores
from sbr_jax.typing import PyTree

BATCH = 32


HeldOut = Remembered[tuple[float, float]]
"""`(base, adapter) -> loss, accuracy` on a held-out set."""


def held_out(model: models.Model, data: TokenDataset) -> HeldOut:
    """:func:`held_out_scores`, remembering its result for the latest weights."""
    return Remembered(functools.partial(held_out_scores, model, data))


def held_out_scores(
    model: models.Model, data: TokenDataset, base: PyTree, adapter: PyTree
) -> tuple[float, float]:
    """Returns the loss per answer token in nats, and next-token accuracy in 0..100."""
    found = answer_scores(
        model.apply_fn, base, adapter, data.tokens, data.mask, batch_size=BATCH
    )
    require_comparable("held-out loss", found.told)
    count = found.counts.sum()
    loss, hits = -found.log_likelihoods.sum() / count, found.hits.sum() / count
    return float(loss), float(100.0 * hits)


def random_tokens(like: TokenDataset, vocabulary: int, seed: int) -> TokenDataset:
    """Returns sequences of random tokens with the masks and lengths of another set."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(3, vocabulary, like.tokens.shape, dtype=np.int32)
    length = np.max(np.where(like.mask > 0, np.arange(like.length) + 1, 0), 1)
    inside = np.arange(like.length)[None, :] < length[:, None]
    inside[:, 0] = False  # The first token stays BOS.
    return TokenDataset(np.where(inside, noise, like.tokens), like.mask)

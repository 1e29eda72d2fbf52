"""Losses on held-out token data sets, and random tokens in the place of a set's."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import models
from sbr_jax.data import TokenDataset
from sbr_jax.losses import token_cross_entropy
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.typing import PyTree

BATCH = 32


@functools.lru_cache(maxsize=8)
def _scorer(apply_fn: Callable[..., jax.Array]) -> Callable[..., tuple]:
    @jax.jit
    def score(base, adapter, tokens, mask):
        logits = apply_fn(base, adapter, tokens)
        losses = token_cross_entropy(logits, tokens, mask)
        counts = jnp.sum(mask[:, 1:], 1)
        right = jnp.argmax(logits[:, :-1], -1) == tokens[:, 1:]
        hits = jnp.sum(jnp.where(right, mask[:, 1:], 0.0))
        told = jnp.all(comparable(logits[:, :-1]) | (mask[:, 1:] == 0), axis=-1)
        return jnp.sum(losses * counts), hits, jnp.sum(counts), told

    return score


@dataclasses.dataclass
class HeldOut:
    """Scores on a held-out set; those of the last weights asked for are kept."""

    model: models.Model
    data: TokenDataset
    _last: tuple[Any, Any, tuple[float, float]] | None = None

    def __call__(self, base: PyTree, adapter: PyTree) -> tuple[float, float]:
        """Returns loss per answer token in nats, and next-token accuracy in 0..100."""
        last = self._last
        if last is None or last[0] is not base or last[1] is not adapter:
            scores = held_out_scores(self.model, self.data, base, adapter)
            self._last = last = (base, adapter, scores)
        return last[2]


def held_out_scores(
    model: models.Model, data: TokenDataset, base: PyTree, adapter: PyTree
) -> tuple[float, float]:
    """Returns the loss per answer token in nats, and next-token accuracy in 0..100."""
    score = _scorer(model.apply_fn)
    total, sure = np.zeros(3), []
    for start in range(0, len(data), BATCH):
        parts = [x[start : start + BATCH] for x in (data.tokens, data.mask)]
        lack = BATCH - len(parts[0])
        padded = (np.pad(x, ((0, lack), (0, 0))) for x in parts)
        *found, told = score(base, adapter, *padded)
        total += [float(x) for x in found]
        sure += np.asarray(told)[: BATCH - lack].tolist()
    require_comparable("held-out loss", sure)
    loss, hits, count = total
    return float(loss / count), float(100.0 * hits / count)


def random_tokens(like: TokenDataset, vocabulary: int, seed: int) -> TokenDataset:
    """Returns sequences of random tokens with the masks and lengths of another set."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(3, vocabulary, like.tokens.shape, dtype=np.int32)
    length = np.max(np.where(like.mask > 0, np.arange(like.length) + 1, 0), 1)
    inside = np.arange(like.length)[None, :] < length[:, None]
    inside[:, 0] = False  # The first token stays BOS.
    return TokenDataset(np.where(inside, noise, like.tokens), like.mask)

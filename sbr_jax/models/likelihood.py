"""Log-likelihoods of given answers, one whole sequence for each answer.

Legend: B sequences, T tokens, K answer places, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import _mesh, _rows
from sbr_jax.distributed import arrays
from sbr_jax.models import answers, vocabulary
from sbr_jax.models.buckets import SAVING, bucket, neighbours
from sbr_jax.models.finite import comparable, require_comparable
from sbr_jax.models.loading import Model
from sbr_jax.progress import task
from sbr_jax.typing import PyTree, UserError


class AnswerScores(NamedTuple):
    """How a model scores the answer of each sequence, NumPy ``[B]``."""

    log_likelihoods: np.ndarray
    """float64, ``Σ_{t in A} log p(tokens[t] | tokens[:t])``, in nats."""
    hits: np.ndarray
    """float64, answer tokens that were the most likely."""
    counts: np.ndarray
    """float64, answer tokens."""
    told: np.ndarray
    """bool, whether the logits of all answer tokens could be compared."""


def read_targets(
    logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log p(target), whether it is the maximum, and whether logits can be compared.

    Returns:
      float32, bool and bool ``[K]``.

    >>> logits = jnp.array([[0.0, 0.0], [0.0, 9.0], [0.0, jnp.nan]])
    >>> [x.tolist() for x in read_targets(logits, jnp.array([0, 1, 0]))[1:]]
    [[True, True, False], [False, True, False]]
    """
    best = jnp.argmax(logits, axis=-1).astype(targets.dtype)
    return _rows.log_likelihood(logits, targets), best == targets, comparable(logits)


@functools.partial(jax.jit, static_argnames=("apply_fn",))
def _read(
    apply_fn: Any,
    base: PyTree,
    adapter: PyTree,
    tokens: jax.Array,
    places: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, ...]:
    """:func:`read_targets` at flat ``places [K]`` of ``tokens [B, T]``."""
    every = answers.hidden(apply_fn, base, adapter, {"tokens": tokens})
    states, head = answers.at_places(every, places), answers.head_of(apply_fn)
    return vocabulary.read(head, base, states, read_targets, targets)


def answer_scores(
    apply_fn: Any,
    base: PyTree,
    adapter: PyTree | None,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    batch_size: int,
    saving: int = SAVING,
) -> AnswerScores:
    """Scores the answers of many sequences, grouped by length.

    **Guarantee**: the device holds at most ``batch_size`` rows at once, and logits only
    of a chunk of answer places. One program is compiled for each width.

    Args:
      apply_fn: the model's, or a function of ``(base, adapter, tokens)`` to logits.
      base: weights to use.
      adapter: ``{name: LoraPair}`` or None.
      tokens: integers ``[B, T]``, right-padded.
      mask: ``[B, T]``, the weight of each answer token, 0 elsewhere.
      batch_size: the most rows in one run.
      saving: tokens of padding that a separate width must save.

    Returns:
      The scores, in the given order. A token's weight counts in all fields but
      ``told``.
    """
    total, length = tokens.shape
    found = np.zeros((3, total))
    told = np.ones(total, bool)
    # The last token of an answer is predicted, but predicts nothing.
    weights = mask[:, 1:]
    ends = (np.arange(1, length) * (weights > 0)).max(axis=1, initial=1)
    counts = (weights > 0).sum(axis=1)
    read = 0
    with task("scores", total) as done, _mesh.using(_mesh.holding(base)):
        for width, group in neighbours(ends, most=length, smallest=16, saving=saving):
            parts = math.ceil(len(group) / batch_size)
            rows = min(bucket(math.ceil(len(group) / parts), 1), batch_size)
            batches = [group[i : i + rows] for i in range(0, len(group), rows)]
            # One number of places for all batches, so that one program serves them.
            room = bucket(max(int(counts[ids].sum()) for ids in batches), 16)
            for ids in batches:
                shown = np.zeros((rows, width), np.int32)
                shown[: len(ids)] = tokens[ids, :width]
                row, column = np.nonzero(weights[ids])
                places, targets = np.zeros((2, room), np.int32)
                places[: len(row)] = row * width + column
                targets[: len(row)] = tokens[ids][row, column + 1]
                read_out = _read(apply_fn, base, adapter, shown, places, targets)
                scores, right, sure = (x[: len(row)] for x in arrays.fetch(read_out))
                weight = weights[ids][row, column].astype(np.float64)
                for out, values in zip(found, (scores, right, 1.0), strict=True):
                    out[ids] = np.bincount(row, weight * values, len(ids))
                told[ids] = np.bincount(row, ~sure, len(ids)) == 0
                read += len(ids)
                done(read)
    return AnswerScores(found[0], found[1], found[2], told)


def token_log_probs(
    model: Model,
    base: PyTree,
    adapter: PyTree | None,
    tokens: Any,
    mask: Any,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Summed log-likelihood of each answer, given its prompt.

    ``Σ_{t in A} log p(tokens[t] | tokens[:t])``.

    **Guarantee**: at most ``batch_size`` rows are on the device at once.

    Args:
      model: the loaded model.
      base: weights to use.
      adapter: ``{name: LoraPair}`` or None.
      tokens: integers ``[B, T]``, right-padded.
      mask: ``[B, T]``, 1 at answer tokens (the set A).
      batch_size: the most rows in one run.

    Returns:
      float32 ``[B]``, in nats.

    Raises:
      UserError: if the shapes differ, or a log-likelihood is not finite.
    """
    tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, np.float32)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise UserError(
            "token_log_probs expected tokens and mask of one shape [B, T], got "
            f"{tokens.shape} and {mask.shape}"
        )
    scores = answer_scores(
        model.apply_fn, base, adapter, tokens, mask, batch_size=batch_size
    )
    out = scores.log_likelihoods.astype(np.float32)
    require_comparable("token_log_probs", scores.told & np.isfinite(out))
    return out

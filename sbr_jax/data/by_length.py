"""Batches of a whole set's examples, grouped by length, for passes without steps.

Legend: N examples of a set.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sbr_jax.data.batches import TokenDataset
from sbr_jax.data.layout import answer_places, round_up, used_lengths


def by_length(
    dataset: TokenDataset, size: int, *, least: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """All examples in batches of similar length; none is half padding or more.

    Args:
      dataset: N examples.
      size: the most examples of a batch.
      least: smaller groups of one length join the next longer ones, so that no program
        is compiled for a few examples.

    Yields:
      ``tokens``, ``mask`` and the results of :func:`answer_places`, each with a leading
      axis of examples; shorter ones first, in an order that neither number changes.
      Batches of one length have one shape, except for the last one's number of
      examples. Sets of similar length share shapes: columns are a multiple of 8 (of
      more if there are many), answer places a multiple of 8.

    >>> tokens = np.ones((5, 40), np.int32)
    >>> mask = np.arange(40) == np.array([[9], [35], [9], [9], [9]])
    >>> [b["tokens"].shape for b in by_length(TokenDataset(tokens, mask), 3)]
    [(3, 16), (1, 16), (1, 40)]
    """
    lengths = used_lengths(dataset)
    sizes = np.array([_length_bucket(int(n)) for n in lengths])
    groups: list[np.ndarray] = []
    waiting = np.zeros(0, np.int64)
    for each in sorted(set(sizes.tolist())):
        waiting = np.concatenate([waiting, np.flatnonzero(sizes == each)])
        if len(waiting) >= least:
            groups.append(waiting)
            waiting = waiting[:0]
    if len(waiting):
        # The longest are too few: they join the group before them.
        joined = [groups.pop()] if groups else []
        groups.append(np.concatenate([*joined, waiting]))
    for group in groups:
        length = _shared_length(int(lengths[group].max()))
        tokens, mask = (
            np.pad(x[group, :length], ((0, 0), (0, max(length - x.shape[1], 0))))
            for x in (dataset.tokens, dataset.mask)
        )
        most = int((mask[:, 1:] > 0).sum(axis=1).max(initial=1))
        places = answer_places(tokens, mask, round_up(most, 8))
        parts = {"tokens": tokens, "mask": mask, **places}
        for start in range(0, len(group), size):
            yield {name: x[start : start + size] for name, x in parts.items()}


def _shared_length(length: int) -> int:
    """A length that other sets share too; beyond 64 at most an eighth longer.

    >>> [_shared_length(n) for n in (3, 9, 31, 38, 260)]
    [3, 16, 32, 40, 288]
    """
    if length <= 8:
        return _length_bucket(length)
    return round_up(length, max(8, (1 << (length - 1).bit_length()) // 16))


def _length_bucket(length: int) -> int:
    """Rounds up to 1 or 1.5 times a power of two; less than half is padding."""
    power = 1 << max(length - 1, 0).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power

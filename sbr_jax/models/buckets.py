"""Rounds lengths to few shapes: each shape costs a compilation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAVING = 4096
"""Tokens of padding that another shape must save to be worth its compilation."""


def bucket(size: int, smallest: int = 8) -> int:
    """Rounds up to 1 or 1.5 times a power of two; at most half is wasted.

    >>> [bucket(n) for n in (1, 9, 13, 40, 64)]
    [8, 12, 16, 48, 64]
    """
    power = smallest
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def neighbours(
    lengths: Sequence[int] | np.ndarray,
    *,
    most: int | None = None,
    smallest: int = 8,
    saving: int = SAVING,
) -> list[tuple[int, np.ndarray]]:
    """Groups sequences of similar length, padding each group to its own width.

    Sequences are padded to the width of the next longer ones, unless a group of their
    own saves enough padding.

    Args:
      lengths: of N sequences, in tokens.
      most: no group is padded beyond this width; None: no limit.
      smallest: the smallest width.
      saving: tokens of padding that a group of its own must save.

    Returns:
      For each group its width and the indices of its sequences, ascending; narrow
      groups first.

    >>> [(n, ids.tolist()) for n, ids in neighbours([9, 60, 10, 64], saving=100)]
    [(12, [0, 2]), (64, [1, 3])]
    >>> [(n, ids.tolist()) for n, ids in neighbours([9, 60, 10, 64], saving=200)]
    [(64, [0, 1, 2, 3])]
    """
    widths = np.array([bucket(int(n), smallest) for n in lengths], np.int64)
    if most is not None:
        widths = np.minimum(widths, most)
    sizes = np.unique(widths).tolist()
    groups: list[tuple[int, np.ndarray]] = []
    waiting = np.zeros(0, np.int64)
    for i, size in enumerate(sizes):
        waiting = np.sort(np.concatenate([waiting, np.flatnonzero(widths == size)]))
        last = i + 1 == len(sizes)
        if last or len(waiting) * (sizes[i + 1] - size) >= saving:
            groups.append((size, waiting))
            waiting = waiting[:0]
    return groups

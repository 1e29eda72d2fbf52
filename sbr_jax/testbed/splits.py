"""Splits of the world, and how lists are divided among them."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

SPLITS = ("train", "calibration", "probe", "validation", "test", "attack")
"""Alignment training; safety calibration; the monitor's probe; validation; test;
and the attacker's own data."""

T = TypeVar("T")


def divide(items: Sequence[T], shares: Sequence[int]) -> dict[str, tuple[T, ...]]:
    """Cuts ``items`` into one consecutive part per split.

    >>> divide("abcdef", (1, 1, 1, 1, 1, 1))["test"]
    ('e',)
    """
    if len(shares) != len(SPLITS) or sum(shares) != len(items):
        raise ValueError(
            f"expected {len(SPLITS)} shares that sum to {len(items)}, got {shares}"
        )
    ends = np.cumsum(shares)
    return {
        split: tuple(items[end - share : end])
        for split, share, end in zip(SPLITS, shares, ends, strict=True)
    }

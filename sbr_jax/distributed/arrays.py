"""Fetches arrays that span hosts."""

from typing import Any

import jax
import numpy as np

from sbr_jax.distributed.agreement import current, is_first
from sbr_jax.typing import PyTree


def fetch(tree: PyTree) -> PyTree:
    """Whole values of arrays, in every process; all processes must call this."""
    if current() is None:
        return jax.device_get(tree)
    return jax.tree.map(_fetch, tree)


def fetch_to_first(tree: PyTree) -> PyTree:
    """Whole values of arrays in process 0, and None in the others.

    All processes must call this. An array of several axes is fetched in parts of its
    first axis, so that no device ever holds more than one whole layer's weight.
    """
    if current() is None:
        return tree
    return jax.tree.map(_fetch_to_first, tree)


def _fetch_to_first(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.ndim < 3:
        whole = _fetch(x)
        return whole if is_first() else None
    found = np.empty(x.shape, x.dtype) if is_first() else None
    for i in range(len(x)):
        part = _fetch(x[i])
        if found is not None:
            found[i] = part
    return found


def _fetch(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)

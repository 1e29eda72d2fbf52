"""Arrays that span hosts, fetched whole."""

from typing import Any

import jax
import numpy as np

from sbr_jax.distributed.agreement import current
from sbr_jax.typing import PyTree


def fetch(tree: PyTree) -> PyTree:
    """The values of arrays, whole in every process; all processes must ask for them."""
    if current() is None:
        return jax.device_get(tree)
    return jax.tree.map(_fetch, tree)


def _fetch(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)

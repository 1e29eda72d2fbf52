"""Checks that weights and scores are finite before they are kept or used.

A step with a finite loss and gradient can still leave weights that are not finite.
Evaluated, they would give what looks like a result.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.typing import PyTree, UserError

SMALL = 2**16
"""Arrays of up to so many entries are fetched; larger ones are checked on the device.
"""


def require_finite(tree: PyTree, where: str) -> None:
    """Refuses weights or states that are not finite.

    Args:
      tree: arrays; integers and booleans are skipped.
      where: names the arrays in messages.

    Raises:
      UserError: naming the first such array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _is_finite(leaf):
            name = jax.tree_util.keystr(path)
            raise UserError(
                f"{where}: expected finite weights, got NaN or infinite ones"
                f"{name and f' in {name}'}; finished stages are kept and nothing of "
                "this one is saved: lower the learning rate, or look at the weights "
                "and data it began with"
            )


def require_number(score: float, where: str) -> float:
    """Refuses a score that is not finite, before a decision depends on it.

    Returns:
      The score.

    Raises:
      UserError: for NaN and infinities.
    """
    if not np.isfinite(score):
        raise UserError(
            f"{where}: expected a finite score, got {score}: look at what it is "
            "evaluated on; finished stages are kept"
        )
    return float(score)


def _is_finite(leaf: Any) -> bool:
    values = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return True
    if isinstance(values, jax.Array) and (
        values.size > SMALL or not values.is_fully_addressable
    ):
        return bool(_all_finite(values))
    return bool(np.isfinite(np.asarray(values)).all())


@jax.jit
def _all_finite(values: jax.Array) -> jax.Array:
    return jnp.isfinite(values).all()

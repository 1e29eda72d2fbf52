"""Refusals of weights and scores that are not finite, before they are kept or used.

A step with a finite loss and gradient can still leave weights that are not; what is
then evaluated looks like a result.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.typing import PyTree, UserError

SMALL = 2**16
"""Entries up to which an array is fetched; larger ones are looked at where they lie."""


def require_finite(tree: PyTree, where: str) -> None:
    """Refuses weights or states that are not finite.

    Args:
      tree: arrays; integers and booleans are passed over.
      where: names what they are.

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
    """Refuses a score that decides what is done next, and is no number.

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

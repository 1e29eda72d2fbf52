"""Refuses weights that are not finite, before they are kept or measured.

A step with a finite loss and gradient can still leave weights that are not; what is
then measured looks like a result.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.typing import PyTree, UserError


def require_finite(tree: PyTree, where: str) -> None:
    """Refuses a small tree (adapter, optimizer and method state) that is not finite.

    Args:
      tree: arrays; integers and booleans are passed over.
      where: names what they are.

    Raises:
      UserError: naming the first such array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.asarray(leaf)
        if _has_infinities(values) and not np.isfinite(values).all():
            raise _broken(where, jax.tree_util.keystr(path))


def require_finite_base(base: PyTree, where: str) -> None:
    """The same for frozen weights, without fetching them from the device.

    Raises:
      UserError: naming the first such array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        if _has_infinities(leaf) and not _all_finite(leaf):
            raise _broken(where, jax.tree_util.keystr(path))


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
            "measured on; finished stages are kept"
        )
    return float(score)


@jax.jit
def _all_finite(values: jax.Array) -> jax.Array:
    return jnp.isfinite(values).all()


def _has_infinities(values: jax.Array | np.ndarray) -> bool:
    return jnp.issubdtype(values.dtype, jnp.inexact)


def _broken(where: str, name: str) -> UserError:
    return UserError(
        f"{where}: expected finite weights, got NaN or infinite ones"
        f"{name and f' in {name}'}; finished stages are kept and nothing of this one "
        "is saved: lower the learning rate, or look at the weights and data it began "
        "with"
    )

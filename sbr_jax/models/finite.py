"""Refuses the logits of broken weights.

The argmax of NaN logits is token 0, an answer like any other. So greedy text, chosen
options and hit rates of such weights look like results. Weights that are finite but
overflow inside are as bad: a norm divides by infinity, and all logits are equal.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.typing import UserError


def comparable(logits: jax.Array) -> jax.Array:
    """True where logits have a usable maximum: no NaN, finite, not all equal.

    >>> rows = [[0.0, -jnp.inf], [0.0, jnp.nan], [0.0, jnp.inf], [3.0, 3.0]]
    >>> comparable(jnp.array(rows)).tolist()
    [True, False, False, False]
    """
    # The maximum of values that include NaN is NaN.
    largest = jnp.max(logits, axis=-1)
    return jnp.isfinite(largest) & (largest > jnp.min(logits, axis=-1))


def require_comparable(what: str, found: Sequence[bool] | np.ndarray) -> None:
    """Refuses logits without a usable maximum.

    Args:
      what: the computation, for the message.
      found: the result of ``comparable`` for each text.
    """
    bad = np.flatnonzero(~np.asarray(found, bool))
    if len(bad):
        raise UserError(
            f"{what}: expected finite logits that differ, got others for {len(bad)} of "
            f"{len(found)} texts (first: {bad[0]}): the weights are NaN, infinite or "
            "overflow, as after a training that diverged; measure the last good ones"
        )

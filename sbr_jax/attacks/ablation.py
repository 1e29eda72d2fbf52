"""Ablate a direction from the weights, so that no layer can write it.

With r̂ a unit vector of the residual stream and y = x W,

    W ← W − W r̂ r̂ᵀ

for every matrix that writes to the stream: the embedding (it writes its rows), the
attention's output and the MLP's output. Everything that a block adds to the stream is
then orthogonal to r̂. So the edit equals removing r̂ from the stream of the running
model after the embedding, every attention and every MLP. With the refusal direction as
r̂, this is an attack that needs no data and no gradient.

If embedding and unembedding are tied, they are one array. The edit then also removes
r̂'s contribution to the logits, which an edit of the running model would keep.

References: Arditi et al., arXiv:2406.11717.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import checks
from sbr_jax.models.codes import as_dense
from sbr_jax.typing import PyTree, UserError

WRITERS = ("o_proj", "down_proj")
"""The projections that write to the residual stream."""


def ablate_direction(base: PyTree, direction: jax.Array | np.ndarray) -> PyTree:
    """Remove a direction from every weight that writes to the residual stream.

    ``W ← W − W r̂ r̂ᵀ``, computed in float32 and rounded once to the dtype of W.

    **Guarantee**: idempotent up to rounding. The given weights are not changed; arrays
    that do not write to the stream are shared with them.

    Args:
      base: base weights. An adapter on one of :data:`WRITERS` writes too, so merge it
        first (``models.merge_adapter``), or the direction survives in it.
      direction: ``[D]``, of any length above 0.

    Returns:
      A tree like ``base``; quantised writers become dense.

    Raises:
      UserError: for a direction of another width, or without a finite length above 0
        (checked outside ``jit`` only).

    >>> import jax, numpy as np
    >>> from sbr_jax import models
    >>> config = models.ModelConfig(
    ...     vocab_size=8, width=4, mlp_width=8, layers=2, heads=2)
    >>> base = models.init_params(jax.random.key(0), config)
    >>> ablated = ablate_direction(base, np.array([0.0, 3.0, 0.0, 0.0]))
    >>> bool((ablated["embed"][:, 1] == 0).all())
    True
    """
    width = base["embed"].shape[-1]
    if direction.shape != (width,):
        raise UserError(
            f"direction: expected the shape ({width},) of the residual stream, got "
            f"{tuple(direction.shape)}"
        )
    direction = jnp.asarray(direction, jnp.float32)
    length = jnp.linalg.norm(direction)
    if not checks.is_traced(length) and not 0 < float(length) < jnp.inf:
        raise UserError(
            f"direction: expected a finite length above 0, got {float(length)}; "
            "nothing would be ablated"
        )
    layers = base["layers"]
    writing = {name: as_dense(layers[name]) for name in WRITERS}
    writing["embed"] = base["embed"]
    edited = _without(writing, direction / length)
    return {**base, "embed": edited.pop("embed"), "layers": {**layers, **edited}}


@jax.jit
def _without(weights: dict[str, jax.Array], unit: jax.Array) -> dict[str, jax.Array]:
    def project(weight: jax.Array) -> jax.Array:
        wide = weight.astype(jnp.float32)
        row = unit.reshape((1,) * (wide.ndim - 1) + (-1,))
        along = jnp.matmul(wide, unit, precision="highest")
        return (wide - along[..., None] * row).astype(weight.dtype)

    return jax.tree.map(project, weights)

"""AsFT: penalise the part of the update outside the direction of alignment.

Yang et al., arXiv:2506.08473. With C of :mod:`sbr_jax.methods._alignment_direction`:

    L = L_task + λ Σ ‖A B (I − C)‖_F²         over layers and projections

(The paper writes (I − C) B A; here C acts on the right.) As published, the update is
A B without LoRA's scale alpha / rank. For the actual change of the weights, the
penalty's weight is therefore λ / scale². The penalty also applies in repairs, which the
paper does not have.

No in × out or out × out matrix is formed: B C comes from two thin products, and the
norm from two r × r Gram matrices. At a fresh adapter (B = 0) penalty and gradient are
zero. The method's state holds V of the adapted projections in the dtype of the weights,
which takes as much memory as a copy of those weights.
"""

import jax
import jax.numpy as jnp

from sbr_jax.checks import checked
from sbr_jax.methods._alignment_direction import (
    Alignment,
    alignments,
    inner_product,
    project,
)
from sbr_jax.methods._compose import with_pull
from sbr_jax.methods.base import Method
from sbr_jax.settings import Positive
from sbr_jax.typing import PyTree


@checked
def asft(*, penalty: Positive = 1.0, monitored: bool = False) -> Method:
    """AsFT as published.

    Args:
      penalty: λ > 0.
      monitored: run CSM.

    Returns:
      The method. It reports ``penalty``, the sum of squares without λ, in every step.

    Raises:
      UserError: if λ is not positive.
    """

    def init(problem, base, adapter, key):
        return alignments(problem, base, adapter, "asft")

    def loss(problem, base, adapter, state, batch, key):
        return outside(adapter, state)

    method = Method("asft", monitored)
    return with_pull(method, "penalty", init, loss, weight=penalty)


def outside(adapter: PyTree, alignment: dict[str, Alignment]) -> jax.Array:
    """Σ ‖A B (I − C)‖_F² over layers and projections, a float32 scalar."""
    total = jnp.float32(0)
    for name, pair in adapter.items():
        rest = pair.lora_b.astype(jnp.float32) - project(pair.lora_b, alignment[name])
        total += jnp.sum(inner_product(pair.lora_a, rest, rest))
    return total

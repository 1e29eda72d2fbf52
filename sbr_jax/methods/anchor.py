"""The anchor on safe answers: SafeAnchor's L_anchor (arXiv:2604.17691).

L_anchor = mean over D_safe of KL(p_reference ‖ p_θ) at the answer positions
"""

import jax
import jax.numpy as jnp

from sbr_jax import losses
from sbr_jax.methods.base import Problem
from sbr_jax.typing import Batch, PyTree, UserError


def anchor_rows(problem: Problem, anchor_batch_size: int | None) -> int:
    """Safety examples of one step's anchor gradient.

    Raises:
      UserError: if they cannot be divided over the microbatches.
    """
    parts = problem.hardware.accumulation
    if anchor_batch_size is None:
        return max(problem.training.batch_size // (2 * parts), 1) * parts
    if anchor_batch_size % parts:
        raise UserError(
            f"anchor_batch_size: expected a multiple of accumulation ({parts}), got "
            f"{anchor_batch_size}"
        )
    return anchor_batch_size


def anchor_loss(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    reference: jax.Array,
    safe: Batch,
    direction: str = "forward",
) -> jax.Array:
    """L_anchor: mean KL(p_{θ_{t−1}} ‖ p_θ) at the answer positions.

    Args:
      problem: for its model.
      base: frozen weights.
      adapter: θ.
      reference: logits ``[B, T, V]`` of θ_{t−1} on the same tokens; constant.
      safe: the safety minibatch.
      direction: of the divergence; ``"forward"`` is published.

    Returns:
      A float32 scalar: 0 with zero gradient at θ = θ_{t−1}.
    """
    logits = problem.apply_fn(base, adapter, safe["tokens"])
    kl = losses.kl_to_reference(reference, logits, safe["mask"], direction=direction)
    return jnp.mean(kl)


__all__ = ["anchor_loss", "anchor_rows"]

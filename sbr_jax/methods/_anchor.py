"""The KL anchor: hold the answers on safe data where a reference has them.

    L_KL = mean over D_safe of KL(p_ref ‖ p_θ) at the answer positions

SafeAnchor's L_anchor (arXiv:2604.17691), and the alignment loss of SafeGrad
(arXiv:2508.07172).

Symbols: θ adapter, γ the weight, τ temperature, B examples, T tokens, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sbr_jax import losses
from sbr_jax.methods._compose import with_cost, with_pull, with_state
from sbr_jax.methods.base import Method, Problem, device_dataset, draw_rows, task_loss
from sbr_jax.typing import Batch, PyTree, UserError


def with_kl_anchor(
    method: Method,
    *,
    weight: float,
    reference: str,
    direction: str,
    batch_size: int | None,
    projecting: bool,
) -> Method:
    """Adds γ L_KL to every step of a method, but not to its repairs.

    Args:
      method: any defence.
      weight: γ > 0.
      reference: whose answers are held: ``"previous"``, the model before the domain, or
        ``"aligned"``, the one before all.
      direction: of the divergence.
      batch_size: safety examples of a step; None for half the task batch.
      projecting: whether the method keeps the anchor's gradient from its projection;
        else one gradient is taken of the whole objective.

    Returns:
      The method. It reports ``anchor``, L_KL.
    """

    def init(problem, base, adapter, key):
        del base, key
        held = jax.tree.map(jnp.copy, adapter)
        return {"safe": device_dataset(problem.calibration), "reference": held}

    def anchor(problem, base, adapter, state, batch, key):
        safe = safe_batch(problem, state["safe"], batch, key, batch_size)
        held = problem.apply_fn(base, state["reference"], safe["tokens"])
        return anchor_loss(problem, base, adapter, held, safe, direction)

    def joint_gradient(problem, base, adapter, state, batch, key):
        def joint(a):
            task = task_loss(problem, base, a, batch, key)
            kl = anchor(problem, base, a, state["anchor"], batch, key)
            return task + weight * kl, (task, kl)

        (_, (task, kl)), grads = jax.value_and_grad(joint, has_aux=True)(adapter)
        return grads, {}, {"loss": task, "anchor": kl}

    def end_domain(problem, base, adapter, state, key):
        adapter, state = method.end_domain(problem, base, adapter, state, key)
        held = jax.tree.map(jnp.copy, adapter)
        return adapter, {**state, "anchor": {**state["anchor"], "reference": held}}

    if projecting:
        anchored = with_pull(
            method, "anchor", init, anchor, weight=weight, repairs=False
        )
    else:
        anchored = with_state(method, "anchor", init)
        anchored = dataclasses.replace(anchored, gradient=joint_gradient)
    if reference == "previous":
        anchored = dataclasses.replace(anchored, end_domain=end_domain)
    return with_cost(anchored, forward=0.5, backward=0.5)


def safe_batch(
    problem: Problem, safe: Batch, batch: Batch, key: jax.Array, size: int | None
) -> Batch:
    """Draws a microbatch's share of the safety examples of one step.

    Args:
      problem: for its sizes.
      safe: the calibration set.
      batch: the task microbatch.
      key: of the step.
      size: examples of the whole step; None for half the task batch.

    Returns:
      ``tokens`` and ``mask``.

    Raises:
      UserError: for a size that cannot be divided over the microbatches.
    """
    parts = problem.hardware.accumulation
    if size is None:
        size = max(problem.training.batch_size // (2 * parts), 1) * parts
    if size % parts:
        raise UserError(
            f"kl_batch_size: expected a multiple of accumulation ({parts}), got {size}"
        )
    return draw_rows(problem, safe, batch, jax.random.fold_in(key, 1), size)


def anchor_loss(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    reference: jax.Array,
    safe: Batch,
    direction: str = "forward",
    temperature: float = 1.0,
) -> jax.Array:
    """L_KL: mean KL(p_ref ‖ p_θ) at the answer positions, ``p = softmax(logits / τ)``.

    Args:
      problem: for its model.
      base: frozen weights.
      adapter: θ.
      reference: logits ``[B, T, V]`` on the same tokens; constant.
      safe: the safety minibatch.
      direction: of the divergence; ``"forward"`` is published.
      temperature: τ of both.

    Returns:
      A float32 scalar in nats: 0 with zero gradient where θ is the reference.
    """
    logits = problem.apply_fn(base, adapter, safe["tokens"])
    if temperature != 1.0:
        reference, logits = reference / temperature, logits / temperature
    kl = losses.kl_to_reference(reference, logits, safe["mask"], direction=direction)
    return jnp.mean(kl)


__all__ = ["anchor_loss", "safe_batch", "with_kl_anchor"]

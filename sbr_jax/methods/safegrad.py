"""SafeGrad: remove from the task gradient what opposes the alignment gradient.

arXiv:2508.07172. With both gradients as vectors over all parameters,

    g_a = ∇_θ mean over D_safe of KL(p_{θ₀} ‖ p_θ)
    g_u ← g_u − (⟨g_u, g_a⟩ / ‖g_a‖²) g_a          where ⟨g_u, g_a⟩ < 0
    g = g_u + ρ g_a

Symbols: θ adapter, θ₀ the aligned model without adapter, g_u task gradient, g_a
alignment gradient, ρ ``weight``, τ ``temperature`` of both distributions.

At θ₀ the divergence is at its minimum and g_a = 0 up to rounding, whose direction
means nothing; a projection would remove it at full strength all the same. So below
10⁻⁶ of ‖g_u‖, about what rounding leaves, g_a counts as no direction.

The hook sees one microbatch: with gradient accumulation each microbatch is tested for
conflict, and projected, against its own share of the safety examples. Then the mean
differs from one big batch's, and ``conflict`` is the share of microbatches.
"""

import jax
import jax.numpy as jnp
import optax

from sbr_jax import losses
from sbr_jax.methods.anchor import anchor_rows
from sbr_jax.methods.base import (
    Method,
    Problem,
    device_dataset,
    draw_rows,
    positive,
    task_gradient,
)
from sbr_jax.typing import Batch, PyTree, UserError

FLOOR = 1e-6
"""Where ‖g_a‖ is below this share of ‖g_u‖, it is rounding."""


def safegrad(
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    anchor_batch_size: int | None = None,
    monitored: bool = False,
) -> Method:
    """SafeGrad with the published defaults.

    Args:
      weight: ρ ≥ 0; 0 leaves only the projection.
      temperature: τ > 0.
      anchor_batch_size: calibration examples of one step's g_a, drawn with
        replacement (None: half the task batch; published: about 20 suffice in all).
      monitored: run CSM.

    Returns:
      The method. It reports ``alignment`` (the divergence from θ₀), ``cosine`` (of
      g_u and g_a, before) and ``conflict`` (1 where something was removed).

    Raises:
      UserError: naming a hyper-parameter that is out of range.
    """
    positive("weight", weight, zero=True)
    positive("temperature", temperature)
    if anchor_batch_size is not None and anchor_batch_size < 1:
        raise UserError(
            f"anchor_batch_size: expected at least 1, got {anchor_batch_size}"
        )

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        del base, adapter, key
        return {"safe": device_dataset(problem.calibration)}

    def gradient(problem, base, adapter, state, batch, key):
        task, extra, metrics = task_gradient(problem, base, adapter, state, batch, key)
        rows = anchor_rows(problem, anchor_batch_size)
        safe = draw_rows(
            problem, state["safe"], batch, jax.random.fold_in(key, 1), rows
        )
        divergence, alignment = jax.value_and_grad(
            lambda a: alignment_loss(problem, base, a, safe, temperature)
        )(adapter)
        kept, found = resolve_conflict(task, alignment)
        grads = jax.tree.map(lambda u, a: u + weight * a, kept, alignment)
        return grads, extra, {**metrics, "alignment": divergence, **found}

    return Method(name="safegrad", monitored=monitored, init=init, gradient=gradient)


def alignment_loss(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    safe: Batch,
    temperature: float = 1.0,
) -> jax.Array:
    """Mean KL(p_{θ₀} ‖ p_θ) at the answer positions, both softened by τ.

    ``p = softmax(logits / τ)``; θ₀ is the model without adapter, whatever domains came
    before.

    Args:
      problem: for its model.
      base: frozen weights.
      adapter: θ.
      safe: the safety minibatch.
      temperature: τ.

    Returns:
      A float32 scalar in nats: 0 with zero gradient at θ₀.
    """
    reference = problem.apply_fn(base, None, safe["tokens"])
    logits = problem.apply_fn(base, adapter, safe["tokens"])
    return jnp.mean(
        losses.kl_to_reference(
            reference / temperature, logits / temperature, safe["mask"]
        )
    )


def resolve_conflict(
    task: PyTree, alignment: PyTree
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Projects g_u off g_a where they oppose each other.

    ``g_u − min(⟨g_u, g_a⟩, 0) / ‖g_a‖² · g_a``, as one vector over all leaves.

    **Guarantee**: afterwards ⟨g_u, g_a⟩ ≥ 0 up to rounding; without conflict g_u is
    unchanged bit for bit; the norm never grows. Where ‖g_a‖ ≤ 10⁻⁶ ‖g_u‖ nothing is
    removed.

    Args:
      task: g_u.
      alignment: g_a, of the same structure.

    Returns:
      The new g_u, and ``conflict`` (0 or 1) and ``cosine``, float32 scalars.

    >>> import jax.numpy as jnp
    >>> kept, found = resolve_conflict(jnp.array([-3.0, 1.0]), jnp.array([2.0, 0.0]))
    >>> kept.tolist(), float(found["conflict"])
    ([0.0, 1.0], 1.0)
    """
    u, a = (jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in (task, alignment))
    norm_u, norm_a = optax.tree.norm(u), optax.tree.norm(a)
    usable = norm_a > FLOOR * norm_u
    # Dividing one norm at a time: ‖g_a‖² of a small gradient underflows.
    along = optax.tree.vdot(u, a) / jnp.where(usable, norm_a, 1.0)
    conflict = usable & (along < 0)
    share = jnp.where(conflict, along, 0.0) / jnp.where(usable, norm_a, 1.0)
    kept = jax.tree.map(
        lambda g, x, y: jnp.where(conflict, (x - share * y).astype(g.dtype), g),
        task,
        u,
        a,
    )
    cosine = jnp.where(usable, along / jnp.where(norm_u > 0, norm_u, 1.0), 0.0)
    return kept, {"conflict": conflict.astype(jnp.float32), "cosine": cosine}


__all__ = ["alignment_loss", "resolve_conflict", "safegrad"]

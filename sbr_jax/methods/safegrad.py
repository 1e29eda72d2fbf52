"""SafeGrad: remove the part of the task gradient that opposes the alignment gradient.

arXiv:2508.07172. With both gradients as vectors over all parameters,

    g_a = ∇_θ mean over D_safe of KL(p_{θ₀} ‖ p_θ)
    g_u ← g_u − (⟨g_u, g_a⟩ / ‖g_a‖²) g_a          where ⟨g_u, g_a⟩ < 0
    g = g_u + ρ g_a

Symbols: θ adapter, θ₀ the aligned model without adapter, g_u task gradient, g_a
alignment gradient, ρ ``kl_weight``, τ ``temperature`` of both distributions.

At θ₀ the divergence is at its minimum, and g_a is 0 up to rounding. The direction of
that rounding means nothing, yet a projection would remove it at full strength. So if
‖g_a‖ is below 10⁻⁶ ‖g_u‖, about the size of rounding, nothing is removed.

The hook sees one microbatch. With gradient accumulation, each microbatch is tested for
conflict, and projected, against its own share of the safety examples. The mean then
differs from that of one big batch, and ``conflict`` is the share of microbatches.
"""

import jax
import jax.numpy as jnp
import optax

from sbr_jax.checks import checked
from sbr_jax.methods._anchor import anchor_loss, anchored_set, safe_batch
from sbr_jax.methods.base import Cost, Method, task_gradient
from sbr_jax.settings import Count, NonNegative, Positive
from sbr_jax.typing import PyTree

FLOOR = 1e-6
"""If ‖g_a‖ is below this share of ‖g_u‖, g_a is rounding."""


@checked
def safegrad(
    *,
    kl_weight: NonNegative = 1.0,
    temperature: Positive = 1.0,
    kl_batch_size: Count | None = None,
    monitored: bool = False,
) -> Method:
    """SafeGrad with the published defaults.

    Args:
      kl_weight: ρ ≥ 0; 0 leaves only the projection.
      temperature: τ > 0.
      kl_batch_size: calibration examples of one step's g_a, drawn with replacement
        (None: half the task batch; published: about 20 suffice in all).
      monitored: run CSM.

    Returns:
      The method. It reports ``alignment`` (the divergence from θ₀), ``cosine`` (of g_u
      and g_a, before the projection) and ``conflict`` (1 if something was removed).
    """

    def init(problem, base, adapter, key):
        return {"safe": anchored_set(problem, base, None)}

    def gradient(problem, base, adapter, state, batch, key):
        task, extra, metrics = task_gradient(problem, base, adapter, state, batch, key)
        safe = safe_batch(problem, state["safe"], batch, key, kl_batch_size)

        def divergence(a: PyTree) -> jax.Array:
            return anchor_loss(problem.apply_fn, base, a, safe, temperature=temperature)

        value, alignment = jax.value_and_grad(divergence)(adapter)
        kept, found = resolve_conflict(task, alignment)
        grads = jax.tree.map(lambda u, a: u + kl_weight * a, kept, alignment)
        return grads, extra, {**metrics, "alignment": value, **found}

    return Method(
        "safegrad", monitored, Cost(backward=0.5), init=init, gradient=gradient
    )


def resolve_conflict(
    task: PyTree, alignment: PyTree
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Project g_u off g_a if they oppose each other.

    ``g_u − min(⟨g_u, g_a⟩, 0) / ‖g_a‖² · g_a``, as one vector over all leaves.

    **Guarantee**: afterwards ⟨g_u, g_a⟩ ≥ 0 up to rounding; without conflict g_u is
    unchanged bit for bit; the norm never grows. If ‖g_a‖ ≤ 10⁻⁶ ‖g_u‖, nothing is
    removed.

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
    # Divide by one norm at a time, because ‖g_a‖² of a small gradient underflows.
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

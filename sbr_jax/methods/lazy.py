"""Lazy: SafeGrad's projection with an alignment gradient renewed every few steps.

This method is ours, after SafeGrad (arXiv:2508.07172). With both gradients as vectors
over all parameters, and θ_s the adapter at the last step s that is a multiple of E:

    g_a = ∇ at θ_s of the mean over r calibration rows of KL_k(p_θ₀ ‖ p_θ)
    g_u ← g_u − (⟨g_u, g_a⟩ / ‖g_a‖²) g_a          where ⟨g_u, g_a⟩ < 0
    g = g_u + ρ g_a

Every step removes the conflict. The state holds g_a, which is computed between two
steps. A branch inside a step would not save work, because mapped seeds run both sides.
The reference is cached once (:mod:`sbr_jax.methods._reference`), so no step sees safe
data at all.

At the start of the first domain θ = θ₀ and g_a = 0, so its first E steps are plain.
With gradient accumulation, each microbatch's g_u is tested for conflict separately.

Symbols: θ adapter, θ₀ the aligned model, E ``refresh_every``, r ``kl_batch_size``, ρ
``kl_weight``, k ``top_tokens``, τ ``self_answers``.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from sbr_jax import _mesh
from sbr_jax.checks import Range, checked
from sbr_jax.methods._reference import (
    Reference,
    cache_reference,
    require_own,
    tied_losses,
)
from sbr_jax.methods._self_answers import with_self_answers
from sbr_jax.methods.base import Cost, Method, Problem, device_dataset, task_gradient
from sbr_jax.methods.safegrad import resolve_conflict
from sbr_jax.methods.sbr import BATCH
from sbr_jax.models import answers
from sbr_jax.settings import Count, NonNegative
from sbr_jax.typing import ApplyFn, Batch, PyTree


@checked
def lazy(
    *,
    kl_weight: NonNegative = 1.0,
    kl_batch_size: Count = 8,
    refresh_every: Count = 8,
    top_tokens: Count = 32,
    self_answers: Annotated[float, Range(least=0, most=1)] | None = None,
    monitored: bool = False,
) -> Method:
    """SafeGrad whose alignment gradient is renewed every few steps.

    Args:
      kl_weight: ρ ≥ 0; 0 leaves only the projection.
      kl_batch_size: r, calibration rows of one g_a, drawn without replacement; all of
        them if there are fewer.
      refresh_every: E, steps from one g_a to the next.
      top_tokens: k, tokens of the reference kept at a place.
      self_answers: τ in [0, 1]; training rows with at least this risk get the aligned
        model's own answer. None keeps all answers.
      monitored: run CSM.

    Returns:
      The method. It reports ``cosine`` (of g_u and g_a, before the projection) and
      ``conflict`` (1 if something was removed). Its ``begin_domain`` refuses a
      reference from another model or calibration set.
    """

    def renewed(problem, base, adapter, state, key):
        count = state["safe"]["tokens"].shape[0]
        rows = jax.random.permutation(key, count)[:kl_batch_size]
        parts = (state["safe"], state["reference"], rows)
        with _mesh.using(_mesh.holding(base)):
            found = _alignment_gradient(problem.apply_fn, base, adapter, *parts)
        return {**state, "alignment": found}

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        reference = cache_reference(problem, base, top_tokens)
        state = {"safe": device_dataset(problem.calibration), "reference": reference}
        return renewed(problem, base, adapter, state, key)

    def begin_domain(problem, base, state, examples, key):
        require_own("lazy", problem, base, state["reference"])
        return examples, {}

    def gradient(problem, base, adapter, state, batch, key):
        task, extra, metrics = task_gradient(problem, base, adapter, state, batch, key)
        kept, found = resolve_conflict(task, state["alignment"])
        grads = jax.tree.map(lambda u, a: u + kl_weight * a, kept, state["alignment"])
        return grads, extra, {**metrics, **found}

    def end_domain(problem, base, adapter, state, key):
        return adapter, renewed(problem, base, adapter, state, key)

    method = Method(
        "lazy",
        monitored,
        Cost(backward=kl_batch_size / (refresh_every * BATCH)),
        init=init,
        begin_domain=begin_domain,
        gradient=gradient,
        end_domain=end_domain,
        refresh=renewed,
        refresh_every=refresh_every,
    )
    if self_answers is not None:
        method = with_self_answers(method, self_answers)
    return method


@functools.partial(jax.jit, static_argnums=0)
def _alignment_gradient(
    apply_fn: ApplyFn,
    base: PyTree,
    adapter: PyTree,
    safe: Batch,
    reference: Reference,
    rows: jax.Array,
) -> PyTree:
    """g_a, the gradient of the mean KL_k over some calibration rows."""
    batch = {**{name: value[rows] for name, value in safe.items()}, "tied": rows}

    def divergence(a: PyTree) -> jax.Array:
        hidden = answers.states(apply_fn, base, a, batch)
        return jnp.mean(tied_losses(apply_fn, base, hidden, batch, reference))

    return jax.grad(divergence)(adapter)

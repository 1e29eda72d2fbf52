"""Projection of a method's steps off a safety subspace that follows the model.

    ĝ_i = g_i − (1 − α_i) V_i V_iᵀ g_i                     in each layer i

V_i and α_i come from :class:`sbr_jax.methods._ssi.Ssi`. After each domain, and on
request also inside one, V_i is merged with the subspace of the adapted model.
"""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax.distributed import arrays
from sbr_jax.methods._compose import with_cost
from sbr_jax.methods._selectivity import selectivity as selectivity_of
from sbr_jax.methods._ssi import Ssi, check_sizes
from sbr_jax.methods.base import LAYER_AXES, InertProjectionWarning, Method, Problem
from sbr_jax.models import is_lora_pair
from sbr_jax.subspace import (
    Subspace,
    discarded_energy,
    effective_rank,
    empty_subspace,
    principal_angles,
)
from sbr_jax.transforms import update_projection
from sbr_jax.transforms.shares import adamw_gradient_projection
from sbr_jax.typing import PyTree, UserError

INERT = 0.95
"""A projection with α above this counts as doing nothing."""

ANGLES = 8
"""Principal angles kept in the results for each layer."""

_METRICS = {"update": "euclidean", "metric": "adam"}
"""Metric of `update_projection`, by the name of the projection."""


def with_projection(
    method: Method,
    ssi: Ssi,
    *,
    projection: str,
    update_subspace: bool,
    refresh_every: int | None,
    control_spectrum: bool,
    selectivity: bool = True,
) -> Method:
    """Project a method's steps off the subspaces that ``ssi`` identifies.

    Args:
      method: any defence with the default ``init``, ``optimizer``, ``end_domain``,
        ``refresh`` and ``outline``.
      ssi: how subspaces are found, merged and relaxed.
      projection: ``"gradient"`` before AdamW, ``"update"`` after it, or ``"metric"``
        after it in Adam's own metric.
      update_subspace: whether to merge after each domain.
      refresh_every: steps between merges inside a domain; None for none.
      control_spectrum: whether to report the spectrum on random data too.
      selectivity: whether to report which share of held-out safety and of the task
        (before the first domain, of the benign control) lies in the subspace of half
        of the calibration set.

    Returns:
      The method. Its ``init`` warns with :class:`InertProjectionWarning` if α is above
      0.95 in every layer, or on average over the layers of one kind of projection.

    Raises:
      UserError: for a method with one of these hooks of its own, which would be lost.
    """
    neutral = Method(method.name)
    for hook in ("init", "optimizer", "end_domain", "refresh", "outline"):
        if getattr(method, hook) is not getattr(neutral, hook):
            raise UserError(
                f"with_projection: expected a method without its own {hook}, got "
                f"{method.name}: project first, then add to it what has one"
            )
    # A separate copy is needed only if it differs from the active subspace.
    apart = ssi.basis in ("random", "shuffled") or refresh_every is not None

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        found = ssi.identify(problem, base, adapter, key)
        alpha = ssi.coefficients(found, found.trace)
        _warn_if_inert(alpha)
        diagnostics = _described(found, alpha, found.trace)
        diagnostics["spectrum"] = found.eigenvalues
        control = problem.calibration_controls.get("random")
        if control_spectrum and control is not None:
            other = ssi.estimate(problem, base, adapter, control, key)
            diagnostics["random_spectrum"] = other.eigenvalues
            diagnostics["random_trace"] = other.trace
        if selectivity:
            benign = problem.calibration_controls.get("benign")
            diagnostics |= selectivity_of(ssi, problem, base, adapter, key, benign)
        state = {"coefficients": alpha, "diagnostics": diagnostics}
        stored = ssi.stored(found)
        state["subspace"] = ssi.active(stored, key)
        if apart:
            state["stored"] = stored
        if ssi.keep_base:
            state["protected"] = found
        return state

    def outline(problem: Problem, base: PyTree, adapter: PyTree) -> dict:
        empty = jax.eval_shape(functools.partial(_empty, ssi), adapter)
        state = {"subspace": empty, "coefficients": empty.trace}
        names = ["stored"] * apart + ["protected"] * ssi.keep_base
        return state | dict.fromkeys(names, empty)

    def renewed(
        problem: Problem, base: PyTree, adapter: PyTree, state: Any, key: jax.Array
    ) -> dict:
        """The state with the current model's subspace merged in."""
        old = state["stored"] if apart else state["subspace"]
        fresh = ssi.identify(problem, base, adapter, key)
        stored = ssi.merged(old, fresh, state.get("protected"))
        alpha = ssi.coefficients(stored, fresh.trace)
        diagnostics = {
            **_described(stored, alpha, fresh.trace),
            **_change(old, fresh, stored),
        }
        if selectivity and problem.domain is not None:
            task = problem.domain
            diagnostics |= selectivity_of(ssi, problem, base, adapter, key, task)
        return {
            **state,
            "subspace": ssi.active(stored, key),
            "coefficients": alpha,
            "diagnostics": diagnostics,
            **({"stored": stored} if apart else {}),
        }

    def refresh(problem, base, adapter, state, key):
        # All merges inside a domain start from the subspace before the domain.
        new = renewed(problem, base, adapter, state, key)
        return {**new, "stored": state["stored"]}

    def end_domain(problem, base, adapter, state, key):
        if update_subspace:
            state = renewed(problem, base, adapter, state, key)
            _warn_if_inert(state["coefficients"])
        return adapter, state

    def optimizer(problem: Problem, adapter: PyTree, learning_rate):
        check_sizes(problem, adapter, ssi.max_rank)
        # Only shapes: zeros would take memory as long as the optimizer lives.
        subspace = jax.eval_shape(functools.partial(_empty, ssi), adapter)
        options = {
            "coefficients": jax.tree.map(jnp.zeros_like, subspace.trace),
            "max_norm": problem.training.max_grad_norm,
            "weight_decay": problem.training.weight_decay,
        }
        if projection == "gradient":
            return adamw_gradient_projection(subspace, learning_rate, **options)
        options |= {"metric": _METRICS[projection], "task_share": True}
        return update_projection(subspace, learning_rate, **options)

    projected = dataclasses.replace(
        method,
        init=init,
        optimizer=optimizer,
        end_domain=end_domain,
        refresh=refresh if refresh_every else None,
        refresh_every=refresh_every,
        outline=outline,
    )
    found = 1 if ssi.contrast is None else 2
    return with_cost(
        projected,
        # `selectivity` runs on half of a set and a few more examples: count it as one.
        fishers=found + control_spectrum + selectivity,
        domain_fishers=int(update_subspace) * (found + selectivity),
        refresh_fishers=found,
        columns=ssi.max_rank,
    )


def _empty(ssi: Ssi, adapter: PyTree) -> Subspace:
    """A subspace of rank 0 with room for ``max_rank`` columns."""
    return empty_subspace(
        adapter, max_rank=ssi.max_rank, unit=is_lora_pair, layer_axes=LAYER_AXES
    )


def _warn_if_inert(alpha: PyTree) -> None:
    found = jax.tree.leaves(arrays.fetch(alpha))
    lowest = min((float(np.min(a)) for a in found), default=1.0)
    if lowest > INERT:
        warnings.warn(
            f"the projection is inert: α is at least {lowest:.3f} in every layer, "
            "because tr F is small against 1/λ; normalise the trace, raise strictness "
            "or use the sampled Fisher",
            InertProjectionWarning,
            stacklevel=3,
        )
        return
    means = {name: float(np.mean(a)) for name, a in alpha.items()}
    idle = {name: mean for name, mean in means.items() if mean > INERT}
    if idle:
        told = ", ".join(f"{name} ({mean:.3f})" for name, mean in idle.items())
        warnings.warn(
            f"the projection is inert for {told}: mean α of its layers; tr F is small "
            "there against other projections: normalisation='kind' compares each with "
            "its own mean",
            InertProjectionWarning,
            stacklevel=3,
        )


def _described(subspace: Subspace, alpha: PyTree, trace: PyTree) -> dict[str, PyTree]:
    """α, tr F and effective rank of every layer of every unit."""
    rank = effective_rank(subspace)
    return {"alpha": alpha, "trace": trace, "effective_rank": rank}


def _change(old: Subspace, fresh: Subspace, new: Subspace) -> dict[str, PyTree]:
    """Movement of a subspace over a domain, for each layer.

    ``fresh`` is the subspace of the model after the domain, and ``new`` its merge with
    ``old``. Returns ``principal_angles [*L, 8]`` between old and fresh, at evenly
    spaced places of the ascending list, and ``discarded``, the share of old that new
    lost.
    """
    shared = jax.tree.map(jnp.minimum, effective_rank(old), effective_rank(fresh))
    angles = jax.tree.map(_spread, principal_angles(old, fresh), shared)
    return {"principal_angles": angles, "discarded": discarded_energy(old, new)}


def _spread(angles: jax.Array, count: jax.Array) -> jax.Array:
    """Eight of the first ``count`` angles, including the first and the last."""
    share = jnp.linspace(0.0, 1.0, ANGLES, dtype=jnp.float32)
    last = jnp.maximum(count - 1, 0)[..., None].astype(jnp.float32)
    share = share.reshape((1,) * count.ndim + (ANGLES,))
    places = jnp.round(last * share).astype(jnp.int32)
    return jnp.take_along_axis(angles, places, axis=-1)

"""A trust region around the aligned model, for any method's optimizer.

    q(θ) = ½ Σ λ_i (u_iᵀ (θ − θ₀))² ≤ ε

(λ_i, u_i) are leading eigenpairs of the Fisher on the calibration set, with scores of
whole answers, at the aligned model. There q is the divergence from the aligned model to
second order, in nats. In every domain, θ₀ is the adapter that the run started from.
After each step, the adapter moves to the nearest point of the ellipsoid
(:func:`sbr_jax.transforms.trust_region`).

A fresh adapter has B = 0 and no gradient in A, so the Fisher covers B alone. It misses
the effect of A once B has moved, so q does not bound the measured divergence.

Therefore ε may instead follow a measurement (:mod:`sbr_jax.methods._kl_budget`): the
user gives a budget of the divergence on held-out rows, and ε is adjusted every few
steps. U and λ may be renewed at the same time, from the Fisher of the current model,
which also covers A once B has moved. ε is then scaled by the change of q, so that the
adapter stays as far inside the region as it was.

Symbols: θ adapter, ε budget, U basis, λ eigenvalues, d measured divergence.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sbr_jax.methods import _kl_budget
from sbr_jax.methods._compose import with_cost, with_gradients
from sbr_jax.methods._ssi import Ssi, check_sizes
from sbr_jax.methods.base import LAYER_AXES, Method, Problem
from sbr_jax.methods.sbr import BATCH
from sbr_jax.models import is_lora_pair
from sbr_jax.subspace import Subspace, empty_subspace
from sbr_jax.subspace.spectrum import coordinates
from sbr_jax.subspace.units import over_layers, to_vector
from sbr_jax.transforms import add_bypass, trust_region
from sbr_jax.typing import PyTree, UserError


def with_trust_region(
    method: Method,
    *,
    epsilon: float | None,
    max_rank: int,
    basis: str = "safety",
    kl_budget: float | None = None,
    refresh_every: int = 8,
    refresh_subspace: bool = False,
) -> Method:
    """Keep a method's adapter where q(θ) ≤ ε, with a fixed ε or one set from d.

    **Guarantee**: q ≤ ε (1 + 1e-3) after every step of every domain and repair, up to
    rounding (see :func:`sbr_jax.transforms.trust_region`), with the ε of that step.

    Args:
      method: any defence without a subspace of its own. Pulls added to it before or
        afterwards take effect.
      epsilon: ε > 0, in nats; None with a budget of d.
      max_rank: cap on the columns of one layer's basis.
      basis: ``"safety"``, or a control with the same λ: ``"random"`` directions, or
        ``"shuffled"`` ones, whose entries belong to other parameters.
      kl_budget: budget of d, in nats per answer token of the held-out rows; None for a
        fixed ε.
      refresh_every: steps between measurements; only with a budget.
      refresh_subspace: renew U and λ too, with one Fisher each time.

    Returns:
      The method. It reports ``budget``, q / ε before each step. With a budget of d, it
      also reports the step's ``epsilon`` and the ``measured_kl`` that set it; it sees
      three quarters of the calibration set, and ``end_domain`` measures too.

    Raises:
      UserError: for a budget with a method that refreshes its own state at another
        interval.
    """
    ssi = _second_order(max_rank, basis)
    measured = kl_budget is not None
    if measured and method.refresh_every not in (None, refresh_every):
        raise UserError(
            f"refresh_every: expected {method.refresh_every}, which {method.name} "
            f"renews its state by, got {refresh_every}"
        )
    inner = _kl_budget.with_held_out(method) if measured else method

    def own(problem: Problem) -> Problem:
        return _kl_budget.without_held_out(problem) if measured else problem

    def kept(problem: Problem, base: PyTree) -> dict[str, Any]:
        if kl_budget is None:
            return {}
        return {"kl_budget": _kl_budget.first_state(problem, base, kl_budget)}

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        held = kept(problem, base)
        state = inner.init(problem, base, adapter, key)
        found = ssi.active(ssi.identify(own(problem), base, adapter, key), key)
        # A copy: steps consume the adapter's buffers.
        centre = jax.tree.map(jnp.copy, adapter)
        return {**state, "subspace": found, "centre": centre, **held}

    def empty(adapter: PyTree) -> Subspace:
        return empty_subspace(
            adapter, max_rank=max_rank, unit=is_lora_pair, layer_axes=LAYER_AXES
        )

    def outline(problem: Problem, base: PyTree, adapter: PyTree) -> dict:
        state = inner.state_shapes(problem, base, adapter)
        found = jax.eval_shape(lambda a: (empty(a), a), adapter)
        held = jax.eval_shape(lambda b: kept(problem, b), base)
        return {**state, "subspace": found[0], "centre": found[1], **held}

    def optimizer(problem: Problem, adapter: PyTree, learning_rate):
        check_sizes(problem, adapter, max_rank)
        subspace = jax.eval_shape(empty, adapter)
        inside = method.optimizer(problem, adapter, learning_rate)
        # With a budget of d, every step passes the ε of the state.
        first = 1.0 if epsilon is None else epsilon
        # Nothing is projected here, so add the pulls' bypass to the gradient.
        return optax.chain(add_bypass(), inside, trust_region(subspace, first))

    def centred(hook):
        def gradient(problem, base, adapter, state, *rest):
            grads, extra, metrics = hook(problem, base, adapter, state, *rest)
            moved = jax.tree.map(jnp.subtract, adapter, state["centre"])
            most: Any = state["kl_budget"]["epsilon"] if measured else epsilon
            used = second_order_divergence(state["subspace"], moved) / most
            extra = {**extra, "centre": state["centre"]}
            metrics = {**metrics, "budget": used}
            if measured:
                extra["epsilon"] = most
                told = state["kl_budget"]["measured"]
                metrics |= {"epsilon": most, "measured_kl": told}
            return grads, extra, metrics

        return gradient

    def refresh(problem, base, adapter, state, key):
        if inner.refresh is not None:
            state = inner.refresh(problem, base, adapter, state, key)
        fresh = None
        if refresh_subspace:
            fresh = ssi.active(ssi.identify(own(problem), base, adapter, key), key)
        return _adapted(problem, base, adapter, state, kl_budget or 1.0, fresh)

    def end_domain(problem, base, adapter, state, key):
        adapter, state = inner.end_domain(problem, base, adapter, state, key)
        state = _adapted(problem, base, adapter, state, kl_budget or 1.0)
        held = state["kl_budget"]
        told = {"measured_kl": held["measured"][None], "epsilon": held["epsilon"][None]}
        diagnostics = {**state.get("diagnostics", {}), **told}
        return adapter, {**state, "diagnostics": diagnostics}

    bounded = dataclasses.replace(
        inner, init=init, optimizer=optimizer, outline=outline
    )
    bounded = with_cost(with_gradients(bounded, centred), fishers=1, columns=max_rank)
    if not measured:
        return bounded
    bounded = dataclasses.replace(
        bounded, refresh=refresh, refresh_every=refresh_every, end_domain=end_domain
    )
    rows = _kl_budget.MEASURED / (refresh_every * BATCH)
    return with_cost(bounded, forward=rows, refresh_fishers=int(refresh_subspace))


def _adapted(
    problem: Problem,
    base: PyTree,
    adapter: PyTree,
    state: dict[str, Any],
    budget: float,
    fresh: Subspace | None = None,
) -> dict[str, Any]:
    """The state with ε set from the divergence now, and with ``fresh`` U and λ."""
    held = state["kl_budget"]
    moved = jax.tree.map(jnp.subtract, adapter, state["centre"])
    subspace, most = state["subspace"], held["epsilon"]
    used = second_order_divergence(subspace, moved)
    if fresh is not None:
        again = second_order_divergence(fresh, moved)
        both = (used > 0) & (again > 0)
        most = jnp.where(both, most * (again / jnp.where(both, used, 1.0)), most)
        subspace, used = fresh, again
    found = _kl_budget.measure(problem, base, adapter, held["held"])
    most = _kl_budget.next_epsilon(most, used, found, jnp.float32(budget))
    held = {**held, "epsilon": most, "measured": found}
    return {**state, "subspace": subspace, "kl_budget": held}


def _second_order(max_rank: int, basis: str) -> Ssi:
    """Options that find U and λ: all leading directions, from whole answers."""
    return Ssi(
        energy=1.0,
        max_rank=max_rank,
        fisher="empirical",
        reduction="sum",
        weighting="eigenvalue",
        normalisation="none",
        strictness=0.0,
        relax=False,
        protect_a="none",
        keep_base=False,
        basis=basis,
    )


def second_order_divergence(subspace: Subspace, moved: PyTree) -> jax.Array:
    """Q = ½ Σ λ (Uᵀ moved)² over all units and layers, a float32 scalar."""
    mark = subspace.fingerprint
    axes = mark.layer_axes
    entries = (mark.entries(subspace.basis), mark.entries(subspace.eigenvalues))
    total = jnp.float32(0.0)
    for part, basis, values in zip(mark.split(moved), *entries, strict=True):
        if basis is not None and jax.tree.leaves(part):
            c = over_layers(coordinates, axes)(to_vector(part, axes), basis)
            total += 0.5 * jnp.sum(values * c**2)
    return total

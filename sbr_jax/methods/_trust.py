"""A trust region about the aligned model, around any method's optimizer.

    q(θ) = ½ Σ λ_i (u_iᵀ (θ − θ₀))² ≤ ε

(λ_i, u_i) are leading eigenpairs of the Fisher on the calibration set, of whole
answers, at the aligned model, where q is the divergence from it to second order, in
nats. θ₀ is the adapter that the run started from, in every domain. After each step the
adapter goes to the nearest point of the ellipsoid
(:func:`sbr_jax.transforms.trust_region`).

A fresh adapter has B = 0 and no gradient in A, so the Fisher covers B alone: what A
does once B has moved is not counted, and q is no bound of the measured divergence.

Symbols: θ adapter, ε budget, U basis, λ eigenvalues.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from sbr_jax.methods._compose import with_cost, with_gradients
from sbr_jax.methods._ssi import Ssi, check_sizes
from sbr_jax.methods.base import LAYER_AXES, Method, Problem, is_lora_pair
from sbr_jax.subspace import Subspace, empty_subspace
from sbr_jax.subspace.spectrum import coordinates
from sbr_jax.subspace.units import over_layers, to_vector
from sbr_jax.transforms import trust_region
from sbr_jax.typing import PyTree


def with_trust_region(method: Method, *, epsilon: float, max_rank: int) -> Method:
    """Keeps a method's adapter where q(θ) ≤ ε.

    **Guarantee**: q ≤ ε (1 + 1e-3) after every step of every domain and repair, up to
    rounding (see :func:`sbr_jax.transforms.trust_region`).

    Args:
      method: any defence without a subspace of its own.
      epsilon: ε > 0, in nats.
      max_rank: cap on the columns of one layer's basis.

    Returns:
      The method. It reports ``budget``, q / ε before each step.
    """
    ssi = Ssi(
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
        basis="safety",
    )

    def init(problem: Problem, base: PyTree, adapter: PyTree, key: jax.Array) -> dict:
        state = method.init(problem, base, adapter, key)
        found = ssi.identify(problem, base, adapter, key)
        # A copy: steps consume the adapter's buffers.
        centre = jax.tree.map(jnp.copy, adapter)
        return {**state, "subspace": found, "centre": centre}

    def empty(adapter: PyTree) -> Subspace:
        return empty_subspace(
            adapter, max_rank=max_rank, unit=is_lora_pair, layer_axes=LAYER_AXES
        )

    def outline(problem: Problem, base: PyTree, adapter: PyTree) -> dict:
        state = method.state_shapes(problem, base, adapter)
        found = jax.eval_shape(lambda a: (empty(a), a), adapter)
        return {**state, "subspace": found[0], "centre": found[1]}

    def optimizer(problem: Problem, adapter: PyTree, learning_rate):
        check_sizes(problem, adapter, max_rank)
        subspace = jax.eval_shape(empty, adapter)
        inner = method.optimizer(problem, adapter, learning_rate)
        return optax.chain(inner, trust_region(subspace, epsilon))

    def centred(hook):
        def gradient(problem, base, adapter, state, *rest):
            grads, extra, metrics = hook(problem, base, adapter, state, *rest)
            moved = jax.tree.map(jnp.subtract, adapter, state["centre"])
            used = second_order_divergence(state["subspace"], moved) / epsilon
            extra = {**extra, "centre": state["centre"]}
            return grads, extra, {**metrics, "budget": used}

        return gradient

    bounded = dataclasses.replace(
        method, init=init, optimizer=optimizer, outline=outline
    )
    return with_cost(with_gradients(bounded, centred), fishers=1, columns=max_rank)


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


__all__ = ["second_order_divergence", "with_trust_region"]

"""A trust region: free steps within a budget of second-order divergence.

Symbols: θ parameters, θ₀ their centre, U basis, λ eigenvalues, c = Uᵀ(θ − θ₀)
coordinates, q = ½ Σ λ c² the divergence, ε the budget, μ ≥ 0 multiplier, P parameters
of a unit, K columns, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sbr_jax import checks
from sbr_jax.subspace import Subspace
from sbr_jax.subspace.record import check_subspace
from sbr_jax.subspace.spectrum import coordinates, dot
from sbr_jax.subspace.units import from_vector, over_layers, to_vector
from sbr_jax.transforms.state import copy_arrays
from sbr_jax.typing import PyTree, UserError

ITERATIONS = 16
"""Newton steps; for random spectra over 24 decades 8 were enough."""


class TrustRegionState(NamedTuple):
    """State of `trust_region`: the subspace and the centre θ₀, owned by the state."""

    subspace: Subspace
    centre: PyTree


def trust_region(
    subspace: Subspace, epsilon: float
) -> optax.GradientTransformationExtraArgs:
    """Keep parameters in the ellipsoid ``½ Σ λ_i c_i² ≤ ε`` around their start.

    ``c = Uᵀ(θ + u − θ₀)``. If q is above ε, the update u is changed so that the step
    ends at the nearest point of the ellipsoid: ``c_i ← c_i / (1 + μ λ_i)`` with the
    smallest μ ≥ 0 for which q = ε. All units and layers share one budget. If λ and U
    belong to a Fisher matrix, q is the KL divergence from the model at θ₀ to second
    order, in nats if the factors were scores of whole answers. In exact arithmetic,
    ε → 0 is strict projection and ε → ∞ changes nothing.

    Place it last in a chain, because it must see the applied step. It sees nothing
    else, so "nearest" is Euclidean. Inside the budget, every optimizer moves as it
    would alone. On the boundary, an optimizer that scales coordinates (Adam) may stop
    where its scaled step is normal to the ellipsoid although the gradient is not. If
    that matters, raise ε or use `update_projection`, which projects in Adam's metric.

    **Guarantee**: ``q(θ + u) ≤ ε (1 + 1e-3)`` after every step, also right after
    `replace_subspace`. The new subspace counts from the next step on, around the same
    θ₀, so that step may be long. Rounding comes on top: q may exceed ε by a further
    share of about ``3 ρ ‖(θ, θ − θ₀, u)‖ √(λ_max / 2ε)``, with ρ = 2⁻²⁴ in float32 and
    2⁻⁹ in bfloat16, where updates round like the parameters. Motion along free
    directions adds to these norms, so keep it, and 1/ε, moderate.

    Newton's method on ``1/√q``, which is concave in μ, finds μ: from 0 it grows to the
    root and never beyond. If an extreme spectrum needs more than the fixed number of
    steps, the result is scaled down, so the bound still holds.

    Args:
        subspace: U and λ; ``init`` copies it into the state, where `replace_subspace`
            may change it. Directions with λ = 0 are free.
        epsilon: ε above 0. Through ``optax.inject_hyperparams`` it may change during
            training.

    Returns:
        A transformation with the state `TrustRegionState`, whose centre is the
        parameters given to ``init``. Its ``update`` needs ``params``. It takes an
        optional ``centre``, a tree that replaces the state's θ₀, and an optional
        ``epsilon``, an array above 0 that replaces ε and may be traced.

    Raises:
        UserError: for an ε that is not above 0; from ``init``, if the parameters do not
            match the subspace; from ``update``, if trees do not fit or ``params`` are
            not given.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import from_factors, trust_region
        >>> s = from_factors({"w": jnp.array([[2.0, 0.0]])}, max_rank=1)
        >>> tx = trust_region(s, 0.5)  # ½ · 4 · c² ≤ 0.5
        >>> params = {"w": jnp.array([1.0, 1.0])}
        >>> u = {"w": jnp.array([3.0, 3.0])}
        >>> tx.update(u, tx.init(params), params)[0]["w"].round(4).tolist()
        [0.5, 3.0]

    References:
        The root: Moré and Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983)
    """
    check_subspace("subspace", subspace)
    checks.number("epsilon", epsilon, above=0.0)
    budget = epsilon

    def init(params: PyTree) -> Any:
        subspace.fingerprint.split(params, what="parameters")
        return TrustRegionState(copy_arrays(subspace), copy_arrays(params))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        centre: PyTree = None,
        epsilon: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del extra
        if params is None:
            raise UserError(
                "expected params in update(updates, state, params), got None; the "
                "trust region lies about them"
            )
        middle = state.centre if centre is None else centre
        most = budget if epsilon is None else epsilon
        return _kept_inside(updates, params, middle, state.subspace, most), state

    return optax.GradientTransformationExtraArgs(init, update)


def _kept_inside(
    updates: PyTree, params: PyTree, centre: PyTree, subspace: Subspace, epsilon: Any
) -> PyTree:
    """The nearest updates that end inside the ellipsoid."""
    mark = subspace.fingerprint
    axes = mark.layer_axes
    parts, back = mark.match(updates, what="updates")
    others = (mark.split(params, what="params"), mark.split(centre, what="centre"))
    bases, values = mark.entries(subspace.basis), mark.entries(subspace.eigenvalues)
    covered = [
        i
        for i, basis in enumerate(bases)
        if basis is not None and jax.tree.leaves(parts[i])
    ]
    if not covered:
        return updates
    # θ − θ₀ first: both are large compared with their difference.
    moved = [
        (to_vector(others[0][i], axes) - to_vector(others[1][i], axes))
        + to_vector(parts[i], axes)
        for i in covered
    ]
    found = [
        over_layers(coordinates, axes)(vector, bases[i])
        for vector, i in zip(moved, covered, strict=True)
    ]
    factors = shrinkage(
        jnp.concatenate([jnp.ravel(c) for c in found]),
        jnp.concatenate([jnp.ravel(values[i]) for i in covered]),
        epsilon,
    )
    out, start = list(parts), 0
    for i, c in zip(covered, found, strict=True):
        factor = factors[start : start + c.size].reshape(c.shape)
        start += c.size
        change = over_layers(dot, axes)(bases[i], (factor - 1.0) * c)
        kept = to_vector(parts[i], axes) + change
        out[i] = from_vector(kept, parts[i], axes)
    return back(out)


def shrinkage(c: jax.Array, values: jax.Array, epsilon: Any) -> jax.Array:
    """Factors ``1 / (1 + μ λ)`` that bring ``½ Σ λ c²`` down to ε; 1 if it is below.

    Args:
        c: coordinates [N].
        values: λ ≥ 0, [N].
        epsilon: ε.

    Returns:
        Factors [N] in (0, 1].
    """
    values = jnp.maximum(values, 0.0)
    peak = jnp.max(values)
    share = values / jnp.where(peak > 0, peak, 1.0)
    # In units of the semi-axes, so that the boundary is ‖y‖ = 1.
    y = jnp.sqrt(values) * c / jnp.sqrt(jnp.asarray(2.0 * epsilon, jnp.float32))

    def step(_: Any, mu: jax.Array) -> jax.Array:
        inner = 1.0 + mu * share
        size, w = _unit(y / inner)
        slope = jnp.sum(w**2 * share / inner)
        more = jnp.maximum(size - 1.0, 0.0) / jnp.maximum(slope, _SMALLEST)
        return jnp.minimum(mu + more, _LARGEST)

    mu = jax.lax.fori_loop(0, ITERATIONS, step, jnp.float32(0.0))
    factor = 1.0 / (1.0 + mu * share)
    size, _ = _unit(y * factor)
    # Newton approaches the boundary from outside; this removes what is left over.
    return jnp.where(values > 0, factor / jnp.maximum(size, 1.0), 1.0)


_SMALLEST, _LARGEST = 1e-37, 1e37


def _unit(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Length and direction of a vector, even if its squares overflow float32."""
    peak = jnp.max(jnp.abs(y))
    scaled = y / jnp.where(peak > 0, peak, 1.0)
    length = jnp.linalg.norm(scaled)
    return peak * length, scaled / jnp.where(length > 0, length, 1.0)

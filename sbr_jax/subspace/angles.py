"""Principal angles and overlaps of two subspaces.

Symbols: V basis [P, K], Π = V Vᵀ, θ principal angles, k effective rank, L layers,
P parameters of a unit, K columns.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sbr_jax._mesh import Split, per_device, split_of, summed
from sbr_jax.subspace import decompositions, spectrum, units
from sbr_jax.subspace.record import Subspace, same_parameters
from sbr_jax.typing import PyTree


def principal_angles(a: Subspace, b: Subspace) -> PyTree:
    """Principal angles between two subspaces, ascending, in radians.

    ``cos θ_j = σ_j(V_aᵀ V_b)``. Below 45°, angles come from
    ``sin θ_j = σ_j((I − Π_a) V_b)``, because the arc cosine loses half the digits of a
    small angle.

    **Guarantee**: every angle, however small, is right to about 1e-6 rad.

    Args:
        a: a subspace of effective rank ``k_a``.
        b: a subspace of effective rank ``k_b``.

    Returns:
        Tree of ``[*L, min(K_a, K_b)]``; the first ``min(k_a, k_b)`` entries are the
        angles, the others are 0.

    Raises:
        UserError: if the two belong to different parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import from_factors, principal_angles
        >>> a = from_factors({"w": jnp.array([[1.0, 0.0]])}, max_rank=1)
        >>> b = from_factors({"w": jnp.array([[1.0, 1.0]])}, max_rank=1)
        >>> jnp.degrees(principal_angles(a, b)["w"]).round(2).tolist()
        [45.0]

    References:
        Knyazev and Argentati, SIAM J. Sci. Comput. 23 (2002); arXiv:2604.17691
    """
    return _pairwise(_angles, a, b)


def _angles(va: jax.Array, vb: jax.Array, split: Split | None) -> jax.Array:
    inner = summed(spectrum.dot(va.T, vb), split)
    rest = vb - spectrum.dot(va, inner)
    rest = rest - spectrum.dot(va, summed(spectrum.dot(va.T, rest), split))
    small = decompositions.triangle(rest)
    if split is not None:  # QR of the devices' stacked triangles is QR of all rows.
        every = jax.lax.all_gather(small, split.axes, axis=0, tiled=True)
        small = decompositions.triangle(every)
    ranks = [jnp.sum(spectrum.used_columns(v, split)) for v in (va, vb)]
    count = min(va.shape[1], vb.shape[1])
    place = jnp.arange(count)
    cos = decompositions.singular_values(inner)[:count]
    sin = decompositions.singular_values(small)[::-1]
    # Ascending sines start with a zero for every unused column of b.
    spare = vb.shape[1] - ranks[1]
    short = vb.shape[1] - sin.shape[0]  # more columns than parameters
    at = jnp.clip(place + spare - short, 0, sin.shape[0] - 1)
    fine = jnp.arcsin(jnp.clip(sin[at], 0.0, 1.0))
    coarse = jnp.arccos(jnp.clip(cos, 0.0, 1.0))
    theta = jnp.where(cos**2 > 0.5, fine, coarse)
    return jnp.where(place < jnp.minimum(*ranks), theta, 0.0)


def overlap(a: Subspace, b: Subspace) -> PyTree:
    """Share of the smaller subspace that lies in the larger: 0 orthogonal, 1 contained.

    ``tr(Π_a Π_b) / min(k_a, k_b)``, the mean squared cosine of the principal angles.

    Args:
        a: a subspace of effective rank ``k_a``.
        b: a subspace of effective rank ``k_b``.

    Returns:
        Tree of ``[*L]`` in [0, 1]; 0 where either rank is 0.

    Raises:
        UserError: if the two belong to different parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import from_factors, overlap
        >>> a = from_factors({"w": jnp.eye(4)[:2]}, max_rank=2, energy=1.0)
        >>> b = from_factors({"w": jnp.eye(4)[1:3]}, max_rank=2, energy=1.0)
        >>> float(overlap(a, b)["w"])
        0.5
    """
    return _pairwise(_shared, a, b)


def _shared(va: jax.Array, vb: jax.Array, split: Split | None) -> jax.Array:
    ranks = [jnp.sum(spectrum.used_columns(v, split)) for v in (va, vb)]
    least = jnp.maximum(jnp.minimum(*ranks), 1).astype(jnp.float32)
    return jnp.sum(summed(spectrum.dot(va.T, vb), split) ** 2) / least


def discarded_energy(old: Subspace, new: Subspace) -> PyTree:
    """Share of the old subspace that the new one no longer covers.

    ``‖(I − Π_new) V_old‖_F² / k_old``. All directions count equally, whatever their
    eigenvalues.

    Args:
        old: the subspace before a merge.
        new: the subspace after it.

    Returns:
        Tree of ``[*L]`` in [0, 1]; 0 where the old rank is 0.

    Raises:
        UserError: if the two belong to different parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import discarded_energy, from_factors
        >>> old = from_factors({"w": jnp.eye(4)[:2]}, max_rank=2, energy=1.0)
        >>> new = from_factors({"w": jnp.eye(4)[1:3]}, max_rank=2, energy=1.0)
        >>> float(discarded_energy(old, new)["w"])
        0.5
    """
    return _pairwise(_lost, old, new)


def _lost(before: jax.Array, after: jax.Array, split: Split | None) -> jax.Array:
    inside = summed(spectrum.dot(after.T, before), split)
    rest = before - spectrum.dot(after, inside)
    rank = jnp.maximum(jnp.sum(spectrum.used_columns(before, split)), 1)
    return summed(jnp.sum(rest**2), split) / rank.astype(jnp.float32)


def _pairwise(function: Callable[..., jax.Array], a: Subspace, b: Subspace) -> PyTree:
    """Apply a function ``(x, y, split)`` of two bases to all units and layers."""
    b = same_parameters(a, b)
    mark = a.fingerprint

    def one(x: jax.Array | None, y: jax.Array | None) -> jax.Array | None:
        if x is None or y is None:
            return None
        split = split_of(x, -2)
        split = None if split != split_of(y, -2) else split
        return _over_pairs(function, mark.layer_axes, split)(x, y)

    return mark.join(list(map(one, mark.entries(a.basis), mark.entries(b.basis))))


# Cached, because a new function would be compiled at every call.
@functools.lru_cache(maxsize=64)
def _over_pairs(
    function: Callable[..., jax.Array], layer_axes: int, split: Split | None
) -> Callable[..., jax.Array]:
    """Lift a function ``(x, y, split)`` of two bases to layers and devices."""
    own = functools.partial(function, split=split)
    lifted = units.over_layers(own, layer_axes)
    if split is None:
        return lifted
    held = (split.along(layer_axes),) * 2
    return jax.jit(per_device(lifted, split.mesh, held, PartitionSpec()))

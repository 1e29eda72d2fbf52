"""`contrast`: directions that are large in one Fisher matrix relative to another.

Symbols: V basis [P, K] with orthonormal columns, Λ eigenvalues, F the Fisher matrix,
ε the regulariser, ρ the energy to keep, Q orthonormal basis of both subspaces,
L layers, P parameters of a unit, K columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sbr_jax import checks
from sbr_jax.subspace import decompositions, spectrum, units
from sbr_jax.subspace.record import Subspace, check_settings, same_parameters


def contrast(
    a: Subspace,
    b: Subspace,
    *,
    max_rank: int,
    energy: float = 0.9,
    regulariser: float = 0.1,
) -> Subspace:
    """Leading directions of one subspace's Fisher relative to another's.

    The directions are the stationary points v, the largest μ first, of

        μ(v) = vᵀ F_a v / vᵀ (F_b + c I) v,     c = ε tr F_b / k_b

    with ``F = V Λ Vᵀ`` for a and b; c is the share ε of the mean of F_b's k_b
    eigenvalues. Directions are added until their span holds ρ of tr F_a. The columns of
    the result are the eigenvectors of F_a restricted to that span, so that the result
    can be merged like any other subspace.

    All of this happens in the joint span of a and b, which has ``K_a + K_b``
    dimensions; outside it, μ is zero. The result is exact if a and b hold all
    directions (``energy=1`` and a ``max_rank`` of at least the number of examples).

    **Guarantee**: nothing of size P × P is built. Neither the scale of F_a nor that of
    F_b changes the directions. As ε grows, they approach the leading eigenvectors of
    F_a; where F_b is zero, they equal them. The trace is that of F_a.

    Args:
        a: the subspace whose directions to keep.
        b: the subspace whose directions to avoid.
        max_rank: K of the result.
        energy: ρ in (0, 1]; reaching it takes more directions than without contrast.
        regulariser: ε above 0.

    Returns:
        A `Subspace` with ``max_rank`` columns.

    Raises:
        UserError: if the two belong to different parameters, or for settings out of
            range.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import contrast, from_factors
        >>> both, own = jnp.array([3.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
        >>> a = from_factors({"w": jnp.stack([both, own])}, max_rank=3, energy=1.0)
        >>> b = from_factors({"w": both[None]}, max_rank=3, energy=1.0)
        >>> abs(contrast(a, b, max_rank=1).basis["w"][:, 0]).round(3).tolist()
        [0.0, 1.0, 0.0]

    References:
        Fukunaga, Introduction to Statistical Pattern Recognition (1990), section 2.3
    """
    b = same_parameters(a, b)
    mark = a.fingerprint
    max_rank = check_settings(mark, max_rank, energy)
    checks.number("regulariser", regulariser, above=0.0)
    fields = [
        [mark.entries(getattr(s, name)) for name in ("basis", "eigenvalues", "trace")]
        for s in (a, b)
    ]
    out: list[tuple[Any, Any, Any]] = []
    for i in range(len(mark.units)):
        mine, other = ([entries[i] for entries in x] for x in fields)
        if mine[0] is None:
            out.append((None, None, None))
            continue
        if other[0] is None:
            other = [jnp.zeros_like(x) for x in mine]
        basis, values = _contrast_unit(
            *mine,
            *other[:2],
            jnp.float32(regulariser),
            columns=max_rank,
            energy=energy,
            layer_axes=mark.layer_axes,
        )
        out.append((basis, values, mine[2]))
    basis, values, trace = (mark.join([entry[j] for entry in out]) for j in range(3))
    return Subspace(basis, values, trace, mark)


@functools.partial(jax.jit, static_argnames=("columns", "energy", "layer_axes"))
def _contrast_unit(
    basis: jax.Array,
    values: jax.Array,
    trace: jax.Array,
    other: jax.Array,
    others: jax.Array,
    regulariser: jax.Array,
    *,
    columns: int,
    energy: float,
    layer_axes: int,
) -> tuple[jax.Array, jax.Array]:
    def one(v, w, whole, x, y):
        return _contrast(v, w, whole, x, y, regulariser, columns, energy)

    return units.over_layers(one, layer_axes)(basis, values, trace, other, others)


def _contrast(
    v: jax.Array,
    values: jax.Array,
    trace: jax.Array,
    other: jax.Array,
    others: jax.Array,
    regulariser: jax.Array,
    columns: int,
    energy: float,
) -> tuple[jax.Array, jax.Array]:
    """Basis ``[P, columns]`` and eigenvalues of one unit and layer."""
    q = spectrum.polish(spectrum.orthonormal(jnp.concatenate([v, other], axis=1)))
    size = q.shape[1]
    scale = jnp.where(trace > 0, trace, 1.0)
    rows = _root(v, values / scale, q)
    total = jnp.sum(others)
    against = _root(other, others / jnp.where(total > 0, total, 1.0), q)
    count = jnp.maximum(jnp.sum(others > 0), 1).astype(jnp.float32)
    metric = spectrum.dot(against.T, against) + regulariser / count * jnp.eye(size)
    # After whitening, μ are squared singular values, so no digits are lost.
    factor = decompositions.cholesky(metric)
    _, sigma, right = decompositions.svd(decompositions.forward(factor, rows.T).T)
    floor = 16 * jnp.finfo(jnp.float32).eps * size**0.5
    used = sigma > floor * jnp.linalg.norm(sigma)
    w = spectrum.masked(decompositions.backward(factor, right.T), used)
    w = spectrum.polish(spectrum.orthonormal(w))
    held = jnp.sum(spectrum.dot(rows, w) ** 2, axis=0)
    keep = spectrum.kept(held, used, trace / scale, energy)
    w = _first(spectrum.masked(w, keep), columns)
    # Like every other subspace, return eigenvectors: those of F_a inside the span.
    _, sigma, right = decompositions.svd(spectrum.dot(rows, w))
    short = columns - len(sigma)
    sigma, right = jnp.pad(sigma, (0, short)), jnp.pad(right.T, ((0, 0), (0, short)))
    used = sigma > floor * jnp.linalg.norm(sigma)
    found = spectrum.polish(
        spectrum.masked(spectrum.dot(q, spectrum.dot(w, right)), used)
    )
    return found, jnp.where(used, jnp.maximum(sigma**2 * scale, spectrum.TINY), 0.0)


def _root(basis: jax.Array, values: jax.Array, q: jax.Array) -> jax.Array:
    """``Λ^½ Vᵀ Q``, whose square is F in the coordinates of Q."""
    return jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * spectrum.dot(basis.T, q)


def _first(x: jax.Array, columns: int) -> jax.Array:
    """Used columns first, cut or padded with zeros to ``columns``."""
    order = jnp.argsort(~spectrum.used_columns(x), stable=True)
    x = x[:, order][:, :columns]
    return jnp.pad(x, ((0, 0), (0, columns - x.shape[1])))

"""`merge`: join two subspaces into one.

Symbols: V basis [P, K] with orthonormal columns, Λ eigenvalues, F the Fisher matrix,
σ singular values, θ principal angles, ρ the energy to keep, L layers, K columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sbr_jax import checks
from sbr_jax._mesh import Split, per_device, split_of
from sbr_jax.subspace import spectrum, units
from sbr_jax.subspace.record import Subspace, check_settings, same_parameters
from sbr_jax.typing import UserError


def merge(
    a: Subspace,
    b: Subspace,
    *,
    max_rank: int,
    energy: float = 0.9,
    weighting: str = "eigenvalue",
    protected: Subspace | None = None,
) -> Subspace:
    """Join two subspaces of the same parameters.

    - ``"eigenvalue"``: leading eigenpairs of ``V_a Λ_a V_aᵀ + V_b Λ_b V_bᵀ``, until
      they reach ``ρ (tr F_a + tr F_b)``. Traces add.
    - ``"uniform"`` (published): left singular vectors of ``[V_a, V_b]`` until their
      σ² reach ``ρ Σσ²``. Eigenvalues are σ² (the published code stores σ), and the
      trace is that of **b**, the new subspace.

    Both keep one column more than the cumulative fractions strictly below ρ. If there
    is nothing to keep, the rank is 0 (the published code keeps 1 column). The traces
    include the energy that a and b dropped themselves, which a merge cannot recover. So
    eigenvalue weighting keeps more columns than ρ of the energy in a and b requires,
    and after many merges all of them.

    **Guarantee**: with eigenvalue weights, ``energy=1`` and enough columns, the result
    is the eigendecomposition of ``F_a + F_b`` to float32 rounding. With uniform
    weights the σ² are ``1 ± cos θ_j`` of the principal angles: the eigenvalues of a and
    b do not count, and the choice among orthogonal directions is arbitrary. Columns of
    ``protected`` are never dropped. They come first and unchanged, with the value
    ``vᵀ F v``, so eigenvalues then need not descend.

    Args:
        a: the old subspace.
        b: the new subspace.
        max_rank: K of the result.
        energy: ρ in (0, 1].
        weighting: ``"eigenvalue"`` or ``"uniform"``.
        protected: subspace whose columns stay, e.g. the first domain's.

    Returns:
        A `Subspace` with ``max_rank`` columns.

    Raises:
        UserError: if the two belong to different parameters, or for unknown settings.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import effective_rank, from_factors, merge
        >>> a = from_factors({"w": jnp.eye(6)[:3]}, max_rank=8, energy=1.0)
        >>> b = from_factors({"w": jnp.eye(6)[:3]}, max_rank=8, energy=1.0)
        >>> m = merge(a, b, max_rank=8, weighting="uniform")
        >>> int(effective_rank(m)["w"]), m.eigenvalues["w"][:3].round(4).tolist()
        (3, [2.0, 2.0, 2.0])

    References:
        arXiv:2604.17691
    """
    b = same_parameters(a, b)
    mark = a.fingerprint
    max_rank = check_settings(mark, max_rank, energy)
    checks.one_of("weighting", weighting, ("eigenvalue", "uniform"))
    bases = [mark.entries(s.basis) for s in (a, b)]
    values = [mark.entries(s.eigenvalues) for s in (a, b)]
    traces = [mark.entries(s.trace) for s in (a, b)]
    first: list[Any] = [None] * len(mark.units)
    if protected is not None:
        protected = same_parameters(a, protected)
        first = mark.entries(protected.basis)
        _check_room(first, max_rank)
    out: list[tuple[Any, Any, Any]] = []
    for i in range(len(mark.units)):
        have = [j for j in range(2) if bases[j][i] is not None]
        if not have:
            out.append((None, None, None))
            continue
        basis, value, trace = _merge_unit(
            [bases[j][i] for j in have],
            [values[j][i] for j in have],
            [traces[j][i] for j in have],
            first[i],
            columns=max_rank,
            energy=energy,
            weighting=weighting,
            layer_axes=mark.layer_axes,
            split=split_of(bases[have[0]][i], -2),
        )
        out.append((basis, value, trace))
    basis, values, trace = (mark.join([entry[j] for entry in out]) for j in range(3))
    return Subspace(basis, values, trace, mark)


def _check_room(protected: list[Any], max_rank: int) -> None:
    """Refuse a cap below the protected rank, which is unknown if traced."""
    for basis in protected:
        if basis is None or checks.is_traced(basis):
            continue
        rank = int(jnp.max(jnp.sum(jnp.any(basis != 0, axis=-2), axis=-1)))
        if rank > max_rank:
            raise UserError(
                f"expected max_rank of at least {rank}, the rank of the protected "
                f"subspace, got {max_rank}; protected columns are never dropped"
            )


@functools.partial(
    jax.jit, static_argnames=("columns", "energy", "weighting", "layer_axes", "split")
)
def _merge_unit(
    bases: list[jax.Array],
    values: list[jax.Array],
    traces: list[jax.Array],
    protected: jax.Array | None,
    *,
    layer_axes: int,
    split: Split | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    merged = functools.partial(_merged, layer_axes=layer_axes, split=split, **options)
    if split is not None:
        held, whole = split.along(layer_axes), PartitionSpec()
        given = (held, whole, whole, held)
        merged = per_device(merged, split.mesh, given, given[:3])
    return merged(bases, values, traces, protected)


def _merged(
    bases: list[jax.Array],
    values: list[jax.Array],
    traces: list[jax.Array],
    protected: jax.Array | None,
    *,
    columns: int,
    energy: float,
    weighting: str,
    layer_axes: int,
    split: Split | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merge one unit, inside ``shard_map`` if devices split its parameters."""
    if weighting == "eigenvalue":
        weights = values
        trace = sum(traces[1:], start=traces[0])
        total = trace
    else:
        weights = [spectrum.used_columns(v, split).astype(jnp.float32) for v in bases]
        trace = traces[-1]
        total = functools.reduce(jnp.add, [jnp.sum(w, axis=-1) for w in weights])
    scaled = spectrum.Scaled(total, jnp.ones_like(total))
    rows = jnp.concatenate(
        [
            jnp.swapaxes(v * jnp.sqrt(jnp.maximum(w, 0.0))[..., None, :], -1, -2)
            for v, w in zip(bases, weights, strict=True)
        ],
        axis=-2,
    )
    options = {"columns": columns, "energy": energy, "split": split}
    if protected is None:
        pairs = functools.partial(spectrum.leading_eigenpairs, **options)
        found = units.over_layers(pairs, layer_axes)(rows, scaled)
    else:
        pairs = functools.partial(spectrum.leading_eigenpairs_beside, **options)
        found = units.over_layers(pairs, layer_axes)(rows, scaled, protected)
    return *found, trace

"""Subspaces from factors of a Fisher matrix, ``F = Σ_n g_n g_nᵀ``.

Symbols: F the Fisher matrix, λ its eigenvalues, M rows of factors [N, P], ρ the energy
to keep, L layers, P parameters of a unit, K columns (static cap), N rows of factors.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sbr_jax import checks
from sbr_jax._mesh import Split, per_device, splitting
from sbr_jax.subspace import blocks, spectrum, units
from sbr_jax.subspace.record import Subspace, check_settings
from sbr_jax.typing import PyTree, UserError


def from_factors(
    factors: PyTree,
    *,
    max_rank: int,
    energy: float = 0.9,
    unit: Callable[[Any], bool] | None = None,
    layer_axes: int | None = None,
) -> Subspace:
    """Leading eigenpairs of ``F = Σ_n g_n g_nᵀ`` from the vectors ``g_n``.

    Pass per-example gradients divided by ``√N`` to get the empirical Fisher matrix.
    Keeps the smallest k with ``Σ_{j≤k} λ_j ≥ ρ tr F``, at most ``max_rank``. If
    ``tr F = 0`` the rank is 0 (the published code keeps one arbitrary column).

    **Guarantee**: nothing of size P × P is built; the eigenpairs equal those of the
    dense F to float32 rounding; all-zero factors give rank 0 and no NaN. Directions
    and rank do not depend on the scale of the factors. Eigenvalues and trace do; where
    they are not zero, they are at least 1.2e-38, float32's smallest normal number.

    Args:
        factors: tree like the parameters, with leaves ``[N, *leaf.shape]``.
        max_rank: K, the static number of columns.
        energy: ρ in (0, 1]; 1 keeps every eigenvalue above rounding.
        unit: predicate like ``is_leaf``; ``None`` makes every leaf a unit.
        layer_axes: how many leading axes of a parameter (after N) count layers.

    Returns:
        The `Subspace` of F.

    Raises:
        UserError: for settings out of range, or factors that are not finite, not
            floating-point, or not equally many for every parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import effective_rank, from_factors
        >>> s = from_factors({"w": jnp.eye(10)}, max_rank=10, energy=0.9)
        >>> int(effective_rank(s)["w"]), float(s.trace["w"])
        (9, 10.0)

    References:
        arXiv:2604.17691
    """
    units.examples(factors, what="factors")
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), factors)
    mark = units.fingerprint(one, unit=unit, layer_axes=layer_axes)
    max_rank = check_settings(mark, max_rank, energy)
    rows = [
        jnp.moveaxis(units.to_vector(u, mark.layer_axes, batch_axes=1), 0, -2)
        for u in mark.treedef.flatten_up_to(factors)
    ]
    traces = [spectrum.sum_of_squares(r) for r in rows]
    for trace in (t.plain() for t in traces):
        if not checks.is_traced(trace) and not jnp.all(jnp.isfinite(trace)):
            raise UserError(
                "expected factors whose squares sum to a finite float32, got an "
                "infinite or undefined trace; divide the factors by their largest entry"
            )
    return from_rows(mark, rows, traces, max_rank=max_rank, energy=energy)


def from_rows(
    mark: units.Fingerprint,
    rows: list[jax.Array],
    traces: list[spectrum.Scaled],
    *,
    max_rank: int,
    energy: float,
    count: int = 1,
    mesh: Mesh | None = None,
) -> Subspace:
    """Subspace of ``Mᵀ M / count``, for rows M ``[*L, N, P]`` and traces of ``Mᵀ M``.

    Rows may have their layer axes joined into one, of size 1 without layer axes.

    Args:
        mark: fingerprint of the parameters.
        rows: rows M per unit; the list is emptied, so that used rows can be freed.
        traces: traces per unit, ``[*L]``.
        max_rank: K, the static number of columns.
        energy: ρ in (0, 1].
        count: number of examples that F is a mean over.
        mesh: mesh whose devices split P and process all layers at once; without one,
            layers are processed one after another to save memory.
    """
    basis, values = [], []
    for trace in traces:
        own = rows.pop(0)
        found = unit_eigenpairs(
            own,
            trace,
            jnp.float32(count),
            columns=max_rank,
            energy=energy,
            split=splitting(own.shape[-1], mesh),
        )
        basis.append(found[0])
        values.append(found[1])
    # A trace is at least the sum of its eigenvalues, even if these are all TINY.
    least = max_rank * spectrum.TINY
    total = [spectrum.Scaled(t.value / count, t.unit).plain(least) for t in traces]
    return Subspace(mark.join(basis), mark.join(values), mark.join(total), mark)


@functools.partial(jax.jit, static_argnames=("columns", "split"))
def unit_eigenpairs(
    rows: jax.Array,
    total: spectrum.Scaled,
    count: jax.Array,
    *,
    columns: int,
    energy: jax.Array | float,
    split: Split | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`spectrum.leading_eigenpairs` over layers: ``[*L, N, P]`` and ``[*L]``.

    The energy is traced, so variants that keep another share run the same program.
    """
    lead = total.value.shape
    totals = spectrum.Scaled(*(x.reshape(-1) for x in total))
    if split is not None:
        rows = rows.reshape(-1, *rows.shape[-2:])
        basis, values = _split_eigenpairs(rows, totals, count, columns, energy, split)
        return basis.reshape(*lead, *basis.shape[1:]), values.reshape(*lead, columns)
    of = spectrum.measure(rows.reshape(-1, *rows.shape[-2:]))

    def pairs(
        of: spectrum.Measured, layer: Any, total: spectrum.Scaled
    ) -> tuple[jax.Array, jax.Array]:
        return spectrum.layer_eigenpairs(of, layer, total, columns, energy, count)

    def one(
        layer: Any, found: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        total = jax.tree.map(lambda x: x[layer], totals)
        x, values = pairs(of, layer, total)
        basis = blocks.place_columns(found[0], layer, x, spectrum.polishing(x))
        return basis, found[1].at[layer].set(values)

    layers, _, size = of.rows.shape
    if layers == 1:
        basis, values = pairs(of, 0, jax.tree.map(lambda x: x[0], totals))
        basis = spectrum.polish(basis)
    else:
        start = jnp.zeros((layers, size, columns)), jnp.zeros((layers, columns))
        basis, values = jax.lax.fori_loop(0, layers, one, start)
    return basis.reshape(*lead, size, columns), values.reshape(*lead, columns)


def _split_eigenpairs(
    rows: jax.Array,
    totals: spectrum.Scaled,
    count: jax.Array,
    columns: int,
    energy: jax.Array | float,
    split: Split,
) -> tuple[jax.Array, jax.Array]:
    """`unit_eigenpairs` for all layers at once, each device with its own parameters."""

    def one(rows: jax.Array, total: spectrum.Scaled) -> tuple[jax.Array, jax.Array]:
        of = spectrum.measure(rows[None], split)
        basis, values = spectrum.layer_eigenpairs(
            of, 0, total, columns, energy, count, split
        )
        return spectrum.polish(basis, split), values

    whole = PartitionSpec()
    given, found = (split.along(2), whole), (split.along(1), whole)
    return per_device(jax.vmap(one), split.mesh, given, found)(rows, totals)

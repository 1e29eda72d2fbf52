"""The record `Subspace`, and checks of its settings.

Symbols: V basis [P, K] with orthonormal columns, Λ eigenvalues, F the Fisher matrix,
L layers, P parameters of a unit, K columns (static cap).
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sbr_jax import checks
from sbr_jax.subspace import spectrum, units
from sbr_jax.typing import PyTree, UserError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["basis", "eigenvalues", "trace"],
    meta_fields=["fingerprint"],
)
@dataclasses.dataclass(frozen=True)
class Subspace:
    """A low-rank approximation of a Fisher matrix, one basis per unit and layer.

    ``F ≈ V Λ Vᵀ`` with ``V [P, K]``. The first three fields are trees with one entry
    per unit: the parameters' structure with each unit replaced by one array.

    **Guarantee**: the first ``effective_rank`` columns are orthonormal to about
    1e-6, the others are zero. K does not depend on the effective rank, so a new rank
    never recompiles. Rank 0 means no constraint. An entry ``None`` leaves its unit
    out.

    Args:
        basis: entries ``[*L, P, K]``, float32.
        eigenvalues: entries ``[*L, K]``, descending, zero where unused.
        trace: entries ``[*L]``, the whole ``tr F`` before any truncation.
        fingerprint: the parametrisation that the subspace belongs to (static).

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import empty_subspace
        >>> s = empty_subspace({"w": jnp.zeros((3, 2))}, max_rank=4)
        >>> s.basis["w"].shape, s.eigenvalues["w"].shape, s.trace["w"].shape
        ((6, 4), (4,), ())

    References:
        arXiv:2604.17691
    """

    basis: PyTree
    eigenvalues: PyTree
    trace: PyTree
    fingerprint: units.Fingerprint

    def __post_init__(self):
        """If Flax is loaded, teach it to save and restore states with a subspace."""
        flax = sys.modules.get("flax.serialization")
        if flax is not None:
            _register(flax)


_FIELDS = ("basis", "eigenvalues", "trace")


@functools.cache
def _register(flax: Any) -> None:
    """Register the record with ``flax.serialization``."""

    def restored(target: Subspace, state: dict[str, Any]) -> Subspace:
        fields = {
            f: flax.from_state_dict(getattr(target, f), state[f]) for f in _FIELDS
        }
        new = dataclasses.replace(target, **fields)
        shapes = ([jnp.shape(x) for x in jax.tree.leaves(s)] for s in (target, new))
        for wanted, got in zip(*shapes, strict=True):
            if wanted != got:
                raise UserError(
                    f"expected a subspace with arrays of shape {wanted}, got {got}; "
                    "build the optimizer with the max_rank that was saved"
                )
        return new

    flax.register_serialization_state(
        Subspace,
        lambda s: {f: flax.to_state_dict(getattr(s, f)) for f in _FIELDS},
        restored,
    )


def empty_subspace(
    params: PyTree,
    *,
    max_rank: int,
    unit: Callable[[Any], bool] | None = None,
    layer_axes: int | None = None,
) -> Subspace:
    """A subspace of rank 0: no constraint, and a start for merges.

    Args:
        params: the parameters, or their shapes.
        max_rank: K, the static number of columns.
        unit: predicate like ``is_leaf``; ``None`` makes every leaf a unit.
        layer_axes: how many leading axes of every leaf count layers.

    Returns:
        A `Subspace` of zeros.

    Raises:
        UserError: for a ``max_rank`` out of range, parameters that are not
            floating-point, or a unit whose leaves disagree on layer axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import effective_rank, empty_subspace
        >>> s = empty_subspace({"w": jnp.ones((5, 3, 2))}, max_rank=2, layer_axes=1)
        >>> effective_rank(s)["w"].tolist()
        [0, 0, 0, 0, 0]

    References:
        arXiv:2604.17691
    """
    mark = units.fingerprint(params, unit=unit, layer_axes=layer_axes)
    max_rank = check_settings(mark, max_rank, 1.0)
    shapes = [(u.layers(mark.layer_axes), u.size(mark.layer_axes)) for u in mark.units]
    return Subspace(
        mark.join([jnp.zeros((*layers, size, max_rank)) for layers, size in shapes]),
        mark.join([jnp.zeros((*layers, max_rank)) for layers, _ in shapes]),
        mark.join([jnp.zeros(layers) for layers, _ in shapes]),
        mark,
    )


def effective_rank(subspace: Subspace) -> PyTree:
    """Number of columns in use, per unit and layer.

    Args:
        subspace: any `Subspace`.

    Returns:
        Tree of int32 ``[*L]``, one entry per unit.

    Example:
        >>> import jax.numpy as jnp
        >>> from sbr_jax import effective_rank, from_factors
        >>> s = from_factors({"w": jnp.ones((7, 3))}, max_rank=2)
        >>> int(effective_rank(s)["w"])
        1
    """
    check_subspace("subspace", subspace)
    return jax.tree.map(
        lambda v: jnp.sum(spectrum.used_columns(v), axis=-1, dtype=jnp.int32),
        subspace.basis,
    )


def same_parameters(a: Subspace, b: Subspace) -> Subspace:
    """The second subspace, arranged in the units and containers of the first.

    Raises:
        UserError: if they belong to different parametrisations.
    """
    for subspace in (a, b):
        check_subspace("subspace", subspace)
    mine, theirs = a.fingerprint, b.fingerprint
    if mine == theirs:
        return b
    place = {spec.names: i for i, spec in enumerate(theirs.units)}
    for spec in mine.units:
        other = theirs.units[place[spec.names]] if spec.names in place else None
        if other is None or other.shapes != spec.shapes:
            got = "nothing there" if other is None else other.shapes
            found = f"{spec.path or '/'}: {spec.shapes} against {got}"
            break
    else:
        if mine.layer_axes == theirs.layer_axes and len(place) == len(mine.units):
            order = [place[spec.names] for spec in mine.units]
            entries = {f: theirs.entries(getattr(b, f)) for f in _FIELDS}
            joined = {f: mine.join([e[i] for i in order]) for f, e in entries.items()}
            return Subspace(**joined, fingerprint=mine)
        counts = len(mine.units), len(theirs.units)
        axes = [mine.layer_axes, theirs.layer_axes]
        found = f"{counts[0]} against {counts[1]} units, layer_axes {axes}"
    raise UserError(
        "expected two subspaces of the same parameters, got different ones "
        f"({found}); compute both on the same tree with the same unit and layer_axes"
    )


def check_subspace(name: str, value: Any) -> None:
    """Raise `UserError` for anything but a `Subspace`."""
    if not isinstance(value, Subspace):
        raise UserError(
            f"expected {name} to be a Subspace, got {checks.shown(value)}; make one "
            "with fisher_subspace or from_factors"
        )


MOST_COLUMNS = 4096
"""Cap on K if no unit has as many parameters; columns beyond P are always zero."""


def check_settings(mark: units.Fingerprint, max_rank: int, energy: float) -> int:
    """``max_rank`` as an ``int``; refuse it or the energy if out of range."""
    size = max(spec.size(mark.layer_axes) for spec in mark.units)
    max_rank = checks.whole(
        "max_rank",
        max_rank,
        most=max(size, MOST_COLUMNS),
        note=f"the largest unit has {size} parameters, and columns beyond are zero",
    )
    checks.number("energy", energy, above=0.0, most=1.0, note="0.9 is published")
    if isinstance(energy, jax.Array):  # it is part of the compiled program
        raise UserError(f"expected energy to be a float, got {checks.shown(energy)}")
    return max_rank

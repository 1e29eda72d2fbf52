r"""Sensitivity of a safety subspace to the number of calibration examples.

Subspaces from the first N_s examples are compared with the subspace from all N:

    overlap(N_s)  = (1/k) ‖V_{N_s}ᵀ V_N‖²_F      k = min of both ranks
    captured(N_s) = share of the energy of all N that lies in V_{N_s}
    twin(N_s)     = overlap of two subspaces from disjoint sets of N_s examples

The first N_s examples are part of all N, which inflates the first two measures. The
twin is not inflated, but exists up to N/2 only. A rank can never exceed N_s.

Symbols: V basis, N examples, k effective rank; chance and captured as in
:mod:`sbr_jax.analysis.harm_types`.
"""

from collections.abc import Mapping
from typing import Any

from sbr_jax.analysis.harm_types import compare, mean_rank
from sbr_jax.subspace import Subspace
from sbr_jax.typing import UserError

SIZES = (30, 60, 120, 240, 480)


def usable_sizes(total: int, sizes: tuple[int, ...] = SIZES) -> list[int]:
    """The sizes below the number of examples, and that number itself.

    Raises:
      UserError: if no size is below it.

    >>> usable_sizes(200)
    [30, 60, 120, 200]
    """
    below = sorted({n for n in sizes if 0 < n < total})
    if not below:
        raise UserError(
            f"sensitivity: expected more than {min(sizes)} calibration examples, got "
            f"{total}; raise their number"
        )
    return [*below, total]


def sensitivity(
    subspaces: Mapping[int, Subspace], twins: Mapping[int, Subspace]
) -> dict[str, Any]:
    """Compare subspaces of growing calibration sets with that of the largest.

    Args:
      subspaces: maps N_s to the subspace of the first N_s examples.
      twins: maps N_s to the subspace of the next N_s examples, if there are as many.

    Returns:
      Lists over ``sizes``: ``overlap``, ``captured`` and ``chance`` against the
      largest, ``rank``, ``twin`` and ``twin_chance`` (None without a twin).
    """
    sizes = sorted(subspaces)
    if len(sizes) < 2:
        raise UserError(f"sensitivity: expected at least two sizes, got {sizes}")
    whole = subspaces[sizes[-1]]
    found = [compare(subspaces[n], whole) for n in sizes]
    pairs = {n: compare(subspaces[n], twins[n]) for n in sizes if n in twins}
    return {
        "sizes": sizes,
        "rank": [mean_rank(subspaces[n]) for n in sizes],
        **{m: [row[m] for row in found] for m in ("overlap", "captured", "chance")},
        "twin": [pairs[n]["overlap"] if n in pairs else None for n in sizes],
        "twin_chance": [pairs[n]["chance"] if n in pairs else None for n in sizes],
    }

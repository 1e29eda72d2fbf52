r"""Fisher subspaces of single kinds of safe behaviour, compared.

For each kind (refusal, truthfulness, ...), two subspaces are estimated from disjoint
halves of equal size. V_a is from a half of kind a, V_b from a half of kind b:

    overlap(a, b)  = (1/k) ‖V_aᵀ V_b‖²_F      both cut to k = min(k_a, k_b) columns
    chance         = k / P                    of two random subspaces of rank k
    ceiling(a)     = overlap of the two halves of kind a
    specific(a, b) = (overlap − chance) / (√(ceiling_a ceiling_b) − chance)
    captured(a, b) = Σ_j λ_bj ‖V_aᵀ v_bj‖² / Σ_j λ_bj

So `specific` is 1 if two kinds are as similar as two samples of one kind, and 0 if they
are as different as random subspaces. P counts only parameters that some column reaches.
In a fresh adapter B = 0 and no gradient reaches A, so counting A would make the chance
level too low.

Kinds differ in the form of their answers as well as in their content. An overlap below
the ceiling does not tell which of the two is the cause.

Symbols: V basis [P, K], λ eigenvalues, k effective rank, a and b kinds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from sbr_jax.subspace import Subspace
from sbr_jax.typing import UserError

REACHED = 1e-6
"""A parameter counts if its row in one of the bases is longer than this."""
MEASURES = ("overlap", "chance", "captured", "rank")


def compare(a: Subspace, b: Subspace) -> dict[str, float]:
    """Compare two subspaces, as means over layers and units.

    Args:
      a: a subspace of the same parameters as b.
      b: its eigenvalues weight ``captured``, the share of its energy that lies in a.

    Returns:
      ``overlap``, ``chance``, ``captured`` in [0, 1], and ``rank``, the k compared.
      Layers where either rank is 0 are left out.

    Raises:
      UserError: if no layer is left, or the two belong to different parameters.

    >>> import jax.numpy as jnp
    >>> from sbr_jax import from_factors
    >>> a = from_factors({"w": jnp.eye(8)[:2]}, max_rank=2, energy=1.0)
    >>> b = from_factors({"w": jnp.eye(8)[1:3]}, max_rank=2, energy=1.0)
    >>> found = compare(a, b)
    >>> found["overlap"], round(found["chance"], 3)  # three of eight are reached
    (0.5, 0.667)
    """
    if a.fingerprint != b.fingerprint:
        raise UserError(
            "compare: expected two subspaces of the same parameters, got different "
            "ones; estimate both on one adapter"
        )
    pairs = zip(_layers(a), _layers(b), strict=True)
    rows = [_one(v, *y) for (v, _), y in pairs if v.shape[1] and y[0].shape[1]]
    if not rows:
        raise UserError(
            "compare: expected a layer where both ranks are at least 1, got none; do "
            "the examples have answers, and does the model depend on the adapter?"
        )
    return dict(zip(MEASURES, np.mean(rows, 0).tolist(), strict=True))


def _layers(subspace: Subspace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Basis ``[P, k]`` and eigenvalues ``[k]`` of each layer of each unit."""
    bases, values = jax.device_get((subspace.basis, subspace.eigenvalues))
    for basis, value in zip(
        jax.tree.leaves(bases), jax.tree.leaves(values), strict=True
    ):
        size, columns = basis.shape[-2:]
        flat = zip(
            basis.reshape(-1, size, columns), value.reshape(-1, columns), strict=True
        )
        for v, eigenvalues in flat:
            used = np.any(v != 0, axis=0)
            yield v[:, used].astype(np.float64), eigenvalues[used].astype(np.float64)


def _one(va: NDArray, vb: NDArray, lb: NDArray) -> tuple[float, float, float, float]:
    """The four measures of one layer; ``lb`` are the eigenvalues of ``vb``."""
    k = min(va.shape[1], vb.shape[1])
    cosines = va.T @ vb
    overlap = np.sum(cosines[:k, :k] ** 2) / k
    lengths = np.sum(va**2, axis=1) + np.sum(vb**2, axis=1)
    chance = min(1.0, k / np.sum(lengths > REACHED**2))
    captured = np.sum(lb * np.sum(cosines**2, axis=0)) / np.sum(lb)
    return float(overlap), float(chance), float(captured), float(k)


def mean_rank(subspace: Subspace) -> float:
    """Effective rank, mean over layers and units."""
    return float(np.mean([v.shape[1] for v, _ in _layers(subspace)]))


def harm_types(halves: Mapping[str, tuple[Subspace, Subspace]]) -> dict[str, Any]:
    """Compare kinds of behaviour pairwise, with chance and the split-half ceiling.

    Args:
      halves: maps a kind to the subspaces of its two halves, all from equally many
        examples.

    Returns:
      ``kinds``, ``rank`` by kind, and ``overlap``, ``chance``, ``captured`` and
      ``specific`` as ``{a: {b: value}}``. The diagonals of ``overlap`` and ``captured``
      compare the two halves of one kind. ``specific`` is None if the ceiling is hardly
      above chance, because then there is no scale to compare with.

    Raises:
      UserError: for fewer than two kinds, or a subspace of rank 0.
    """
    kinds = list(halves)
    if len(kinds) < 2:
        raise UserError(f"harm_types: expected at least two kinds, got {kinds}")
    table: dict[str, dict[str, dict[str, float | None]]]
    table = {m: {a: {} for a in kinds} for m in ("overlap", "chance", "captured")}
    for a in kinds:
        for b in kinds:
            # Compare across halves, so that no subspace is compared with itself.
            first = compare(halves[a][0], halves[b][1])
            second = compare(halves[a][1], halves[b][0])
            for measure in table:
                table[measure][a][b] = (first[measure] + second[measure]) / 2
    specific = {a: {b: _specific(table, a, b) for b in kinds} for a in kinds}
    ranks = {a: float(np.mean([mean_rank(s) for s in halves[a]])) for a in kinds}
    return {"kinds": kinds, "rank": ranks, **table, "specific": specific}


def _specific(table, a: str, b: str) -> float | None:
    overlap, chance = table["overlap"], table["chance"][a][b]
    ceiling = np.sqrt(overlap[a][a] * overlap[b][b])
    if ceiling - chance < 0.05:  # Otherwise a ratio of noise to noise.
        return None
    return float((overlap[a][b] - chance) / (ceiling - chance))

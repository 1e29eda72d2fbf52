"""Shares, effective ranks and overlaps of Fisher subspaces.

    share(k) = Σ_{j ≤ k} λ_j / tr F,    rank(ρ) = min {k : share(k) ≥ ρ}
    overlap  = (1/k) Σ_j cos² θ_j

λ_j are the eigenvalues, descending; tr F is the whole trace, before any truncation; θ_j
are the principal angles between a subspace and the next domain's. The rank of an
empirical Fisher is at most its number of examples, so a spectrum means something only
beside a control from equally many examples.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cumulative_share(
    eigenvalues: ArrayLike, trace: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Share of the trace in the leading eigenvectors.

    Args:
        eigenvalues: `[..., K]`, descending; unused ones are zero.
        trace: `[...]`, the whole trace; None for the sum of the eigenvalues.

    Returns:
        `[..., K]` in 0..1; zero where the trace is zero.

    >>> cumulative_share([2.0, 1.0, 1.0, 0.0]).tolist()
    [0.5, 0.75, 1.0, 1.0]
    """
    values = np.clip(np.asarray(eigenvalues, np.float64), 0.0, None)
    total = np.sum(values, -1) if trace is None else np.asarray(trace, np.float64)
    total = np.broadcast_to(total, values.shape[:-1])[..., None]
    positive = total > 0
    shares = np.cumsum(values, -1) / np.where(positive, total, 1.0)
    return np.where(positive, np.minimum(shares, 1.0), 0.0)


def rank_for_energy(
    eigenvalues: ArrayLike, trace: ArrayLike | None = None, *, energy: float = 0.9
) -> NDArray[np.int64]:
    """Number of eigenvectors that hold the share `energy` of the trace.

    Args:
        eigenvalues: `[..., K]`, descending.
        trace: `[...]`, the whole trace; None for the sum of the eigenvalues.
        energy: the share ρ in 0..1.

    Returns:
        `[...]`; 0 for a zero spectrum, K if K columns do not suffice.

    >>> rank_for_energy([[8.0, 1.0, 1.0], [0.0, 0.0, 0.0]], energy=0.9).tolist()
    [2, 0]
    """
    shares = cumulative_share(eigenvalues, trace)
    below = np.sum(shares < energy - 1e-12, -1)
    rank = np.minimum(below + 1, shares.shape[-1])
    return np.where(shares[..., -1] > 0, rank, 0)


def overlap(angles: ArrayLike) -> float:
    """Mean squared cosine of the principal angles between two subspaces.

    Args:
        angles: `[k]`, in radians.

    Returns:
        1 for equal subspaces, 0 for orthogonal ones.

    >>> overlap([0.0, 0.0])
    1.0
    """
    values = np.asarray(angles, np.float64)
    return float(np.mean(np.cos(values) ** 2)) if values.size else 0.0

"""Shares, ranks and overlaps against their definitions."""

import numpy as np
import pytest

from sbr_jax.analysis import spectrum


def test_rank_and_shares():
    values = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    assert spectrum.rank_for_energy(values, energy=0.9).tolist() == [3, 1, 0]
    assert spectrum.rank_for_energy(values[:1], [100.0]).tolist() == [4]
    assert np.all(np.diff(spectrum.cumulative_share(values), axis=-1) >= 0)


def test_overlap_from_angles_matches_projectors():
    rng = np.random.default_rng(0)
    a, b = (np.linalg.qr(rng.standard_normal((12, 3)))[0] for _ in range(2))
    angles = np.arccos(np.clip(np.linalg.svd(a.T @ b)[1], 0, 1))
    assert spectrum.overlap(angles) == pytest.approx(np.sum((a.T @ b) ** 2) / 3)

"""Safe Delta against a loop, and both ends of its budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs_case import compiled
from weight_space_case import (
    BASE,
    PROBLEM,
    STUDY,
    TUNED,
    capture,
    dense,
    random_adapter,
)

from sbr_jax import models
from sbr_jax.data import subset
from sbr_jax.methods.safe_delta import hessians, safe_delta, safe_weights


def slow_weights(aligned, tuned, hessian, strength):
    """The released code's rule entry by entry, in float64, and what it kept."""
    w, target, h = (np.array(x, np.float64) for x in (aligned, tuned, hessian))
    count, outputs = w.shape
    for m in range(count):
        h[m, m] = 1.0 if h[m, m] == 0 else h[m, m]
    h += 0.01 * np.mean(np.diag(h)) * np.eye(count)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    weight = 1 / np.diag(upper) ** 2
    budget = strength / 2 * np.mean(weight) * outputs / 4096
    entries = [(m, j) for m in np.argsort(weight) for j in range(outputs)]
    kept, spent = set(), 0.0
    for m, j in entries[: len(entries) - int(0.15 * len(entries))]:
        spent += (target[m, j] - w[m, j]) ** 2 * weight[m]
        if spent > budget:
            break
        kept.add((m, j))
    for m in range(count):
        for j in range(outputs):
            if (m, j) not in kept:
                continue
            moved = target[m, j] - w[m, j]
            w[m, j] = target[m, j]
            w[m + 1 :, j] += moved / upper[m, m] * upper[m, m + 1 :]
    return w, kept


@pytest.mark.parametrize("strength", [0.0, 20.0, 300.0, 1e9])
def test_kept_entries_are_the_cheapest_and_the_others_make_up_for_them(strength):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8)) * rng.uniform(0.1, 2, 8)
    x[:, 3] = 0  # An input that is never there.
    hessian = (2 * x.T @ x / 40).astype(np.float32)
    w = rng.normal(size=(8, 5)).astype(np.float32)
    tuned = (w + 0.1 * rng.normal(size=w.shape)).astype(np.float32)
    found = np.asarray(safe_weights(*map(jnp.asarray, (w, tuned, hessian)), strength))
    twin, kept = slow_weights(w, tuned, hessian, strength)
    np.testing.assert_allclose(found, twin, rtol=1e-3, atol=1e-4)
    sizes = {0.0: 0, 1e9: 34}
    assert len(kept) == sizes[strength] if strength in sizes else 0 < len(kept) < 34
    if strength:
        # Compensation: safe inputs are disturbed less than by the kept ones alone.
        alone = w.copy()
        for m, j in kept:
            alone[m, j] = tuned[m, j]
        disturbed = [np.linalg.norm(x @ (v - w)) for v in (found, alone)]
        assert disturbed[0] < disturbed[1]


def test_what_is_deployed_lies_between_the_aligned_and_the_tuned_model():
    names = list(TUNED)
    found = hessians(PROBLEM, BASE, names, len(STUDY.calibration))
    _, seen = capture(BASE, None, STUDY.calibration.tokens)
    for name in names:
        rows = [
            dense(seen["inputs"][name][:, i, : np.flatnonzero(mask).max() + 1])
            for i, mask in enumerate(STUDY.calibration.mask)
        ]
        x = np.concatenate(rows, axis=1)
        twin = 2 * np.einsum("lti,ltj->lij", x, x) / x.shape[1]
        np.testing.assert_allclose(found[name], twin, rtol=1e-4, atol=1e-5)
    ends = {}
    for strength in (0.0, 1e9):
        base, adapter = safe_delta(strength=strength).deploy(PROBLEM, BASE, TUNED, {})
        assert adapter is None
        ends[strength] = base["layers"]
    # Every domain and every probe deploys: the second time nothing is compiled.
    other = random_adapter(1)
    with compiled() as again:
        safe_delta(strength=1e9).deploy(PROBLEM, BASE, other, {})
    assert again == []
    merged = models.merge_adapter(BASE, TUNED)["layers"]
    jax.tree.map(np.testing.assert_array_equal, ends[0.0], BASE["layers"])
    for name in names:
        tuned = np.isclose(ends[1e9][name], merged[name], atol=1e-6).mean()
        assert 0.8 < tuned < 0.9  # The dearest 15 % are never kept.


def test_weights_in_codes_come_back_dense():
    coded = models.quantize(BASE, "int8", targets="(q|k|v|o)_proj")
    problem = dataclasses.replace(PROBLEM, calibration=subset(STUDY.calibration, 4))
    base, _ = safe_delta(strength=0.0).deploy(problem, coded, TUNED, {})
    decoded = models.dequantize(coded)
    jax.tree.map(np.testing.assert_array_equal, base["layers"], decoded["layers"])

"""Merging Fishers over their traces, against dense sums; the grid of projections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from methods_case import SETTINGS, STUDY, program
from subspace_case import normal, rank

from sbr_jax import from_factors
from sbr_jax.methods import resolve
from sbr_jax.methods._ssi import Ssi
from sbr_jax.recipes.sweeps import SWEEPS
from sbr_jax.training.program import init_adapter

SIZE, COLUMNS = 12, 12


def ssi(weighting, **changes):
    fixed = {"energy": 1.0, "max_rank": COLUMNS, "fisher": "empirical"}
    fixed |= {"reduction": "sum", "normalisation": "none", "strictness": 0.5}
    fixed |= {"relax": True, "protect_a": "none", "keep_base": False, "basis": "safety"}
    return Ssi(weighting=weighting, **{**fixed, **changes})


def fishers(scales, rows=3):
    """Subspaces of two layers of one unit, and their dense Fishers ``[t, 2, P, P]``."""
    factors = [
        np.sqrt(s) * normal(seed, rows, 2, SIZE) for seed, s in enumerate(scales)
    ]
    made = [
        from_factors({"w": jnp.asarray(g)}, max_rank=COLUMNS, energy=1.0, layer_axes=1)
        for g in factors
    ]
    g = [np.moveaxis(reference.f64(x), 1, 0) for x in factors]
    return made, np.array([np.swapaxes(x, -1, -2) @ x for x in g])


def stored(weighting, made, **changes):
    options = ssi(weighting, **changes)
    first = options.stored(made[0])
    for other in made[1:]:
        first = options.merged(first, other, made[0])
    return first


def dense(subspace):
    v, w = reference.f64(subspace.basis["w"]), reference.f64(subspace.eigenvalues["w"])
    return v @ (w[..., None] * np.swapaxes(v, -1, -2))


SCALES = [(1.0, 1.0, 1.0), (1e-3, 1.0, 50.0), (4.0, 1e-4, 0.02)]


@pytest.mark.parametrize("scales", SCALES)
def test_what_is_stored_is_the_sum_of_the_fishers_over_their_traces(scales):
    made, dense_fishers = fishers(scales)
    traces = np.trace(dense_fishers, axis1=-2, axis2=-1)[..., None, None]
    found = stored("unit-trace", made)
    np.testing.assert_allclose(dense(found), (dense_fishers / traces).sum(0), atol=2e-6)
    np.testing.assert_allclose(found.trace["w"], [3.0, 3.0], rtol=1e-6)
    # And by eigenvalue it is the sum of the Fishers themselves.
    whole = dense_fishers.sum(0)
    by_value = dense(stored("eigenvalue", made))
    np.testing.assert_allclose(by_value, whole, atol=2e-6 * np.abs(whole).max())


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_a_factor_of_a_fisher_changes_nothing(scale):
    made, _ = fishers((1.0, 1.0, 1.0))
    scaled, _ = fishers((1.0, scale, 1.0))
    ours, theirs = (dense(stored("unit-trace", x)) for x in (made, scaled))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    # Nor does the order in which they came.
    np.testing.assert_allclose(
        dense(stored("unit-trace", scaled[::-1])), theirs, atol=2e-6
    )


def test_the_aligned_models_directions_outlive_a_drifted_fisher():
    """The defect: a trace a thousand times larger takes all of the columns."""
    made, _ = fishers((1e-3, 1.0))
    few = {"max_rank": 3, "energy": 0.9}

    def left(weighting, **changes):
        found = reference.f64(stored(weighting, made, **few, **changes).basis["w"])
        first = reference.f64(made[0].basis["w"])[..., :3]
        inside = np.swapaxes(found, -1, -2) @ first
        return (inside**2).sum((-2, -1)) / 3

    chance = 3 / SIZE
    assert np.all(left("eigenvalue") < chance + 0.35)
    assert np.all(left("unit-trace") > left("eigenvalue") + 0.1)
    np.testing.assert_allclose(left("eigenvalue", keep_base=True), 1.0, atol=1e-5)


def test_a_layer_without_a_gradient_stays_empty():
    made, _ = fishers((1.0, 1.0))
    zero = jax.tree.map(lambda x: x.at[1].set(0.0), made[0])
    found = ssi("unit-trace").stored(zero)
    np.testing.assert_allclose(found.trace["w"], [1.0, 0.0], rtol=1e-6)
    assert rank(found) == [3, 0]
    assert np.isfinite(dense(stored("unit-trace", [zero, made[1]]))).all()


def test_relaxation_sees_the_raw_trace():
    made = {}
    for weighting in ("eigenvalue", "unit-trace"):
        found = program(
            "safeanchor-exact:projection-only",
            weighting=weighting,
            normalisation="none",
            strictness=1e-3,
        )
        args = (found.problem, STUDY.model.params, init_adapter(STUDY, SETTINGS, 0))
        state = found.method.init(*args, jax.random.key(0))
        made[weighting] = (state["coefficients"], state["subspace"])
    (alpha, plain), (same, unit) = made["eigenvalue"], made["unit-trace"]
    jax.tree.map(np.testing.assert_array_equal, alpha, same)
    jax.tree.map(np.testing.assert_array_equal, plain.basis, unit.basis)
    for name, trace in unit.trace.items():
        np.testing.assert_array_equal(trace, (np.asarray(plain.trace[name]) > 0) * 1.0)


# --- the grid -------------------------------------------------------------------------


def test_the_grid_has_every_combination_once_and_the_projection_alone():
    cells, seen = SWEEPS["projection-grid"], set()
    for name, cell in cells.items():
        changes = cell["changes"]["methods"]["safeanchor_exact"]
        (row,) = cell["methods"]
        _, defaults = resolve(row)
        options = dataclasses.replace(defaults, **changes)
        assert not options.monitored
        assert options.kl_weight == 0.0
        assert not options.control_spectrum
        assert cell["changes"]["study"] == {"split": "validation"}
        assert cell["first_seed"] == 100
        merge = "keep-base" if options.keep_base else options.weighting
        relaxed = options.normalisation if options.relax else "strict"
        assert name == f"{options.projection}-{merge}-{relaxed}"
        seen.add((options.projection, merge, relaxed))
    assert len(seen) == len(cells) == 3 * 4 * 4

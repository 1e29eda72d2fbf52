"""Methods in a trust region: the bound in every domain, and both of its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from methods_case import SETTINGS, STUDY, without_diagnostics
from trees import vector

from sbr_jax import empty_subspace
from sbr_jax.data.batches import batch
from sbr_jax.methods._compose import with_pull
from sbr_jax.methods._ssi import perturb_b
from sbr_jax.methods._trust import with_trust_region
from sbr_jax.methods.base import Method
from sbr_jax.models import is_lora_pair
from sbr_jax.training.program import init_adapter
from sbr_jax.training.step import TrainState, make_step

BASE = STUDY.model.params
KEY = jax.random.key(0)


def dense_divergence(subspace, moved):
    """q over all layers of all pairs, in float64, from vec([B; A])."""
    total = 0.0
    for name, pair in moved.items():
        basis, values = subspace.basis[name], subspace.eigenvalues[name]
        for layer in range(basis.shape[0]):
            parts = (pair.lora_b[layer], pair.lora_a[layer])
            delta = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in parts])
            c = np.asarray(basis[layer], np.float64).T @ delta
            total += 0.5 * np.sum(np.asarray(values[layer], np.float64) * c**2)
    return total


def walked(epsilon, steps=4, repairs=False):
    """Two domains of a few steps: q after each step, metrics, the last adapter."""
    row = "lean"
    options = {} if epsilon is None else {"epsilon": epsilon, "max_rank": 6}
    made = tiny.program(row, SETTINGS, STUDY, **options)
    method, problem = made.method, made.problem
    adapter = init_adapter(STUDY, SETTINGS, 0)
    state = without_diagnostics(method.init(problem, BASE, adapter, KEY))
    first, seen, told = jax.tree.map(np.array, adapter), [], []
    for index, domain in enumerate(STUDY.domains.values()):
        data = method.mix(problem, domain.train, 0)
        train = made.start(adapter, state)
        for step in range(steps):
            key = jax.random.fold_in(KEY, index)
            train, metrics = made.step(BASE, train, state, batch(data, 8, 0, step), key)
            if epsilon is not None:
                moved = jax.tree.map(jnp.subtract, train.adapter, first)
                seen.append(dense_divergence(state["subspace"], moved))
                told.append(float(metrics["budget"]))
        adapter = train.adapter
    return seen, told, vector(adapter), (made, state, adapter)


@pytest.fixture(scope="module")
def bounded():
    return walked(0.05)


def test_the_budget_holds_after_every_step_about_the_first_adapter(bounded):
    seen, told, _, _ = bounded
    assert max(seen) <= 0.05 * (1 + 1e-3)
    assert max(seen) > 0.04
    # What is reported is q before the step, in budgets.
    np.testing.assert_allclose(told[1:4], np.array(seen[:3]) / 0.05, rtol=1e-3)
    np.testing.assert_allclose(told[5:], np.array(seen[4:-1]) / 0.05, rtol=1e-3)


def test_a_repair_stays_inside_as_well(bounded):
    _, _, _, (made, state, adapter) = bounded
    data = made.method.mix(made.problem, STUDY.domains["legal"].train, 0)
    # Far outside: one step of a repair brings it back, about the first adapter.
    out = perturb_b(KEY, adapter, 30.0)
    train = made.start(out, state, repair=True)
    safe = batch(STUDY.calibration, 8, 0, 0)
    drawn = batch(data, 8, 0, 0)
    train, _ = made.repair_step(BASE, train, state, drawn, KEY, safe, jnp.float32(1))
    centre = state["centre"]
    moved = jax.tree.map(jnp.subtract, out, centre)
    assert dense_divergence(state["subspace"], moved) > 1.0
    moved = jax.tree.map(jnp.subtract, train.adapter, centre)
    assert dense_divergence(state["subspace"], moved) <= 0.05 * (1 + 1e-3)


def test_controls_of_a_region_have_its_eigenvalues_about_other_directions(bounded):
    safety = bounded[3][1]["subspace"]
    adapter = init_adapter(STUDY, SETTINGS, 0)
    for basis in ("random", "shuffled"):
        options = {"epsilon": 0.05, "max_rank": 6, "basis": basis}
        made = tiny.program("lean", SETTINGS, STUDY, **options)
        control = made.method.init(made.problem, BASE, adapter, KEY)["subspace"]
        for name, values in safety.eigenvalues.items():
            np.testing.assert_array_equal(control.eigenvalues[name], values)
            one, other = control.basis[name], safety.basis[name]
            used = np.asarray(values) > 0
            square = np.asarray(jnp.einsum("lpk,lpk->lk", one, one))
            np.testing.assert_allclose(square[used], 1.0, atol=1e-5)
            assert np.abs(np.asarray(one - other)).max() > 1e-2


def test_a_large_budget_is_no_trust_region(bounded):
    free, none = walked(1e9)[2], walked(None)[2]
    np.testing.assert_allclose(free, none, atol=1e-6)
    assert np.abs(bounded[2] - none).max() > 1e-3


def still(problem, base, adapter, state, batch, key):
    """No task at all."""
    del problem, base, state, batch, key
    return jax.tree.map(jnp.zeros_like, adapter), {}, {"loss": jnp.float32(0)}


def pulled(method):
    """With a penalty on the adapter's size."""

    def loss(problem, base, adapter, state, batch, key):
        del problem, base, state, batch, key
        return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(adapter))

    return with_pull(method, "size", lambda *args: {}, loss)


def bound(method):
    return with_trust_region(method, epsilon=1e9, max_rank=2)


@pytest.mark.parametrize("nesting", [(pulled, bound), (bound, pulled)])
def test_a_pull_is_felt_inside_and_outside_of_a_trust_region(nesting):
    """A region that is no bound changes nothing, least of all who is heard."""
    adapter = perturb_b(KEY, init_adapter(STUDY, SETTINGS, 0), 1.0)
    bare = Method("still", gradient=still)
    both = nesting[1](nesting[0](bare))
    empty = empty_subspace(adapter, max_rank=2, unit=is_lora_pair, layer_axes=1)
    state = {"size": {}, "subspace": empty, "centre": adapter}
    problem = tiny.problem(STUDY.model.apply_fn, STUDY.calibration)
    after = []
    for method, own in ((pulled(bare), {"size": {}}), (both, state)):
        optimizer = method.optimizer(problem, adapter, 1e-2)
        step = jax.jit(make_step(problem, method.gradient, optimizer))
        train = TrainState(adapter, optimizer.init(adapter), jnp.int32(0))
        rows = {"tokens": jnp.zeros((1, 1), jnp.int32)}
        after.append(vector(step(BASE, train, own, rows, KEY)[0].adapter))
    assert np.abs(after[0] - vector(adapter)).max() > 5e-3
    np.testing.assert_allclose(after[1], after[0], atol=1e-7)
